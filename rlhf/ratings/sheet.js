"use strict";
// The rating page. State: {raterId, rater, ratings: {item: {criterion: 1-5}}, notes: {item: text}}, kept in the browser.
(() => {
  const sheet = document.body.dataset.sheet;
  const slot = `rlhf-rating-${sheet}`;
  const $ = (id) => document.getElementById(id);
  const screens = [...document.querySelectorAll("main > section")];
  const fieldsets = [...document.querySelectorAll("fieldset")];
  const articles = [...document.querySelectorAll("article")];
  const itemOf = (node) => node.closest("article").dataset.item;
  const hex = (n) => [...crypto.getRandomValues(new Uint8Array(n))].map((b) => b.toString(16).padStart(2, "0")).join("");
  let at = 0;
  let state = { raterId: hex(16), rater: "", ratings: {}, notes: {} };

  try {
    const kept = JSON.parse(localStorage.getItem(slot));
    if (kept && kept.raterId) state = kept;
  } catch { /* nothing stored, or storage is off: the page still works */ }

  function keep() {
    try { localStorage.setItem(slot, JSON.stringify(state)); }
    catch { $("status").textContent = "This browser does not store your ratings: save them before you close the page."; }
  }

  const valueOf = (fieldset) => (state.ratings[itemOf(fieldset)] || {})[fieldset.dataset.criterion];
  const given = () => fieldsets.filter(valueOf).length;

  function showWord(fieldset, input) {
    fieldset.querySelector(".word").textContent = `${input.value}: ${input.dataset.word}`;
  }

  function progress() {
    const done = given();
    $("bar").value = done / fieldsets.length;
    $("count").textContent = `${done} of ${fieldsets.length} ratings`;
    const left = fieldsets.length - done;
    $("missing").textContent = left
      ? `${left} ratings are still missing. You can save now and continue later. Only a complete sheet counts.`
      : "All ratings are complete. Thank you.";
  }

  function show(index, focus = true) {
    at = Math.max(0, Math.min(index, screens.length - 1));
    screens.forEach((screen, i) => { screen.hidden = i !== at; });
    $("back").disabled = at === 0;
    $("next").disabled = at === screens.length - 1;
    if (!focus) return;
    window.scrollTo(0, 0);
    screens[at].querySelector("h2").focus();
  }

  function focusOn(fieldset) {
    const screen = screens.indexOf(fieldset.closest("section"));
    if (screen !== at) show(screen, false);
    const input = fieldset.querySelector("input:checked") || fieldset.querySelector("input");
    input.focus();
    fieldset.scrollIntoView({ block: "nearest" });
  }

  function rate(fieldset, value) {
    const item = itemOf(fieldset);
    const input = fieldset.querySelector(`input[value="${value}"]`);
    input.checked = true;
    (state.ratings[item] ||= {})[fieldset.dataset.criterion] = value;
    showWord(fieldset, input);
    keep();
    progress();
  }

  function nextOpen() {
    const open = fieldsets.find((fieldset) => !valueOf(fieldset));
    if (open) focusOn(open); else show(screens.length - 1);
  }

  function record() {
    const items = {};
    for (const article of articles) {
      const item = article.dataset.item;
      items[item] = {
        prompt: article.closest("section").querySelector(".prompt").textContent,
        response: article.querySelector(".response").textContent,
        ratings: state.ratings[item] || {},
        note: state.notes[item] || "",
      };
    }
    return { sheet_id: sheet, rater_id: state.raterId, rater: state.rater.trim(), complete: given() === fieldsets.length,
      saved: new Date().toISOString(), items };
  }

  function named() {
    if (state.rater.trim()) return true;
    show(0);
    $("rater").focus();
    $("count").textContent = "Please give your name or initials.";
    return false;
  }

  function save() {
    if (!named()) return;
    const blob = new Blob([JSON.stringify(record(), null, 1)], { type: "application/json" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `ratings-${sheet.slice(0, 6)}-${state.rater.trim().replace(/[^A-Za-z0-9]+/g, "_") || "rater"}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    $("status").textContent = `Saved as ${link.download}. Give this file to the person who runs the rating.`;
  }

  async function send() {
    if (!named()) return;
    $("status").textContent = "Sending…";
    try {
      const answer = await fetch(`ratings${location.search}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(record()) });
      const text = await answer.text();
      $("status").textContent = answer.ok ? "Received. Thank you. Sending again replaces it." : `Not received: ${text}`;
    } catch {
      $("status").textContent = "Not received: no answer from the server. Save as a file instead.";
    }
  }

  for (const fieldset of fieldsets) {
    const value = valueOf(fieldset);
    const input = value && fieldset.querySelector(`input[value="${value}"]`);
    if (input) { input.checked = true; showWord(fieldset, input); }
    fieldset.addEventListener("change", (event) => rate(fieldset, Number(event.target.value)));
  }
  for (const article of articles) {
    const box = article.querySelector("textarea");
    box.value = state.notes[article.dataset.item] || "";
    box.addEventListener("input", () => { state.notes[article.dataset.item] = box.value; keep(); });
  }
  $("rater").value = state.rater;
  $("rater").addEventListener("input", () => { state.rater = $("rater").value; keep(); });
  $("next").addEventListener("click", () => show(at + 1));
  $("back").addEventListener("click", () => show(at - 1));
  $("open").addEventListener("click", nextOpen);
  $("save").addEventListener("click", save);
  $("send").addEventListener("click", send);
  $("send").hidden = !location.protocol.startsWith("http");

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("textarea, input[type=text]")) return;
    const fieldset = event.target.closest("fieldset");
    if (fieldset && "12345".includes(event.key)) {
      event.preventDefault();
      rate(fieldset, Number(event.key));
      const following = fieldsets[fieldsets.indexOf(fieldset) + 1];
      if (following && following.closest("section") === fieldset.closest("section")) focusOn(following);
      else $("next").focus();
    } else if (event.key === "n") {
      event.preventDefault();
      nextOpen();
    }
  });

  // A rater who comes back continues where ratings are missing.
  const open = fieldsets.find((fieldset) => !valueOf(fieldset));
  show(!given() ? 0 : open ? screens.indexOf(open.closest("section")) : screens.length - 1, false);
  progress();
})();
