// What a CPU build of PyTorch lacks to let tensors say that they are on a CUDA device: a device guard that does nothing,
// hooks that answer "there is CUDA", pinned memory that is known as such, generators. No kernel, no driver.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace {

// Asked each time: a process that is forked later is told its rank then.
c10::DeviceIndex here() {
  const char* rank = std::getenv("LOCAL_RANK");
  return rank ? static_cast<c10::DeviceIndex>(std::atoi(rank)) : 0;
}

c10::Device device() { return c10::Device(c10::DeviceType::CUDA, here()); }
c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return here() + 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool isStreamCapturing(const c10::Stream&) const override { return false; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Ordinary memory, and which addresses of it were asked for as pinned.
struct Pinned final : c10::Allocator {
  static Pinned& get() {
    static Pinned* one = new Pinned();  // never destroyed: memory may be given back as the process ends
    return *one;
  }
  c10::DataPtr allocate(size_t n) override {
    void* data = std::malloc(n ? n : 1);
    std::lock_guard<std::mutex> lock(mutex);
    blocks[data] = n ? n : 1;
    return {data, data, &Pinned::release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Pinned::release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
  bool has(const void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    auto after = blocks.upper_bound(const_cast<void*>(data));
    if (after == blocks.begin()) return false;
    auto block = std::prev(after);
    return static_cast<const char*>(data) < static_cast<const char*>(block->first) + block->second;
  }
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(get().mutex);
      get().blocks.erase(data);
    }
    std::free(data);
  }
  std::mutex mutex;
  std::map<void*, size_t> blocks;
};

// Draws as a CPU's and says that it is the device's.
struct DeviceGenerator final : at::CPUGeneratorImpl {
  DeviceGenerator() { device_ = ::device(); }
};

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return here() + 1; }
  DeviceIndex getCurrentDevice() const override { return here(); }
  void init() const override {}
  bool isPinnedPtr(const void* data) const override { return Pinned::get().has(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &Pinned::get(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<DeviceGenerator>(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
