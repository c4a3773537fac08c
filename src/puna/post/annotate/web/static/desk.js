"use strict";
// Drafts are saved while one types, and everything has a key. Without this the forms still work.
const form = document.getElementById("answer");
const saved = document.getElementById("saved");
const token = document.body.dataset.csrf;
let timer = 0, running = Promise.resolve(), last = "";

function answer() {
  const fields = Object.fromEntries(new FormData(form));
  delete fields.csrf;
  return JSON.stringify(fields);
}

function save() {
  clearTimeout(timer);
  const body = answer();
  if (body === last) return running;
  last = body;
  running = running.then(async () => {
    saved.textContent = "saving";
    try {
      const done = await fetch(form.dataset.draft, {
        method: "POST", body, keepalive: body.length < 60000,
        headers: { "content-type": "application/json", "x-csrf": token },
      });
      saved.textContent = done.status === 204 ? "draft saved" : "draft not saved";
    } catch {
      saved.textContent = "draft not saved, no connection";
      last = "";
    }
  });
  return running;
}

if (form && form.dataset.draft) {
  last = answer();
  form.addEventListener("input", () => {
    saved.textContent = "changed";
    clearTimeout(timer);
    timer = setTimeout(save, 700);
  });
  // What was typed last must be there when the draft before it is asked for.
  document.getElementById("undo").addEventListener("click", (event) => {
    if (answer() === last) return;
    event.preventDefault();
    save().then(() => event.target.click());
  });
  form.addEventListener("submit", () => clearTimeout(timer));
  document.addEventListener("visibilitychange", () => { if (document.hidden) save(); });
}

function isTyping(target) {
  return target.matches("textarea, select, input:not([type=radio])");
}

function press(selector) {
  const found = document.querySelector(selector);
  if (found) found.click();
  return Boolean(found);
}

document.addEventListener("keydown", (event) => {
  const { key } = event;
  let done = false;
  if (key === "Enter" && (event.ctrlKey || event.metaKey)) done = press("#submit") || press("[value=accept]");
  else if (event.altKey && key.toLowerCase() === "z") done = press("#undo");
  else if (event.altKey && key.toLowerCase() === "s") done = press("#skip");
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (key === "Escape" && isTyping(event.target)) { event.target.blur(); done = true; }
  else if (isTyping(event.target)) return;
  else if (/^[1-9]$/.test(key)) done = press(`[data-key="${key}"]`);
  else if (key === "?") { document.body.classList.toggle("no-side"); done = true; }
  else if (key === "f" && document.getElementById("reason")) { document.getElementById("reason").focus(); done = true; }
  else if (key === "t" && document.querySelector("textarea")) { document.querySelector("textarea").focus(); done = true; }
  else if (/^[a-z]$/.test(key)) done = press(`[data-press="${key}"]`);
  if (done) event.preventDefault();
});
