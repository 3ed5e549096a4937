// The page of `jaxdistill.serve`: a request a keystroke, the newest wins.

const PAUSE = 600; // milliseconds without a keystroke before the teacher starts
const KEPT = 24; // pictures of the history
const RETRY = [500, 1000, 2000, 3000, 5000];

const $ = (id) => document.getElementById(id);
const el = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);

const info = await (async () => {
  for (let i = 0; ; i++) {
    try {
      const answer = await fetch("/api/info");
      if (answer.ok) return await answer.json();
    } catch { /* said below */ }
    away(RETRY[Math.min(i, RETRY.length - 1)]);
    await new Promise((done) => setTimeout(done, RETRY[Math.min(i, RETRY.length - 1)]));
  }
})();

let socket = null;
let attempts = 0;
let newest = 0; // id of the last request
let current = null; // {id, state, keyed, drawn} of the request whose answers are shown; drawn: the student's part of it has come
let pause = 0;
let settled = 0; // the timer that puts a picture into the history
const shown = { student: [], teacher: [] }; // {url, blob, state, seed} by index

// ------------------------------------------------------------------------------------------- controls

function radios(id, values, label) {
  for (const value of values) {
    const line = el("label");
    line.append(el("input", { type: "radio", name: id, value, id: `${id}-${value}` }), label(value));
    $(id).append(line);
  }
}
const chosen = (id) => Number(document.querySelector(`input[name="${id}"]:checked`).value);
const choose = (id, value) => { ($(`${id}-${value}`) ?? document.querySelector(`input[name="${id}"]`)).checked = true; };
const newSeed = () => Math.floor(Math.random() * 2 ** 32);

function state() {
  const seed = $("seed").valueAsNumber;
  return {
    prompt: $("caption").value.trim(),
    steps: chosen("steps"),
    count: chosen("counts"),
    seed: Number.isInteger(seed) && seed >= 0 && seed < 2 ** 32 ? seed : 0,
    correction: $("correction").checked,
    lock: $("lock").checked,
  };
}

function restore(from) {
  $("caption").value = from.prompt;
  choose("steps", from.steps);
  choose("counts", from.count);
  $("seed").value = from.seed;
  $("correction").checked = from.correction;
  $("lock").checked = from.lock;
}

function fromFragment(fallback) {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name, allowed) => {
    const value = Number(given.get(name));
    return given.has(name) && allowed(value) ? value : fallback[name];
  };
  const flag = (name) => (["0", "1"].includes(given.get(name)) ? given.get(name) === "1" : fallback[name]);
  return {
    prompt: (given.get("prompt") ?? fallback.prompt).slice(0, info.max_prompt),
    steps: number("steps", (n) => info.steps.includes(n)),
    count: number("count", (n) => info.counts.includes(n)),
    seed: number("seed", (n) => Number.isInteger(n) && n >= 0 && n < 2 ** 32),
    correction: flag("correction"),
    lock: flag("lock"),
  };
}

function toFragment(s) {
  const fields = { prompt: s.prompt, steps: s.steps, count: s.count, seed: s.seed, correction: Number(s.correction), lock: Number(s.lock) };
  history.replaceState(null, "", `#${new URLSearchParams(fields)}`);
}

// ------------------------------------------------------------------------------------------- requests

function say(text, isAway = false) {
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").classList.toggle("away", isAway);
}

function away(wait) {
  say(`The server is away. Trying again in ${wait / 1000} s.`, true);
}

/** Ask for the picture of what stands in the controls; with `teacher` for the teacher's too. */
function ask({ teacher = false, keyed = performance.now() } = {}) {
  clearTimeout(pause);
  const s = state();
  toFragment(s);
  const drawn = teacher && Boolean(current?.drawn); // nothing has changed since: the student need not draw it again
  current = null;
  if (!s.prompt) {
    say("Type a caption.");
    return;
  }
  if (socket?.readyState !== WebSocket.OPEN) return; // asked again when it is back
  const id = ++newest;
  current = { id, state: s, keyed, drawn };
  socket.send(JSON.stringify({
    id, prompt: s.prompt, steps: s.steps, seed: s.seed, count: s.count, noise_correction: s.correction, student: !drawn, teacher,
  }));
  $("teacher").querySelector(".grid").classList.add("stale");
  $("teacher").querySelector("progress").hidden = true;
  if (!teacher && info.teacher && $("with-teacher").checked) pause = setTimeout(() => ask({ teacher: true, keyed: 0 }), PAUSE);
}

function again() {
  if (!$("lock").checked) $("seed").value = newSeed();
  ask();
}

function connect() {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  socket = new WebSocket(`${scheme}://${location.host}/ws`);
  socket.onopen = () => { attempts = 0; say(""); ask(); };
  socket.onmessage = (event) => receive(JSON.parse(event.data));
  socket.onclose = () => {
    const wait = RETRY[Math.min(attempts++, RETRY.length - 1)];
    away(wait);
    setTimeout(connect, wait);
  };
}

function receive(message) {
  const request = message.id === current?.id ? current : null;
  if (message.kind === "error") {
    if (request || message.id === -1) say(message.message);
  } else if (!request) {
    return; // of an older request
  } else if (message.kind === "image") {
    show(message, request);
  } else if (message.kind === "progress") {
    const bar = $("teacher").querySelector("progress");
    bar.hidden = false;
    bar.value = message.done / message.of;
  } else if (message.kind === "done") {
    finish(message, request);
  }
}

// ------------------------------------------------------------------------------------------- pictures

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

function show(message, { state: s, keyed }) {
  const figure = $(message.model);
  const grid = figure.querySelector(".grid");
  grid.className = `grid of${s.count}${info.image.width <= 128 ? " small" : ""}`;
  const blob = new Blob([bytes(message.png)], { type: "image/png" });
  const pictures = shown[message.model];
  while (pictures.length > s.count) URL.revokeObjectURL(pictures.pop().url);
  if (pictures[message.index]) URL.revokeObjectURL(pictures[message.index].url);
  pictures[message.index] = { url: URL.createObjectURL(blob), blob, state: s, seed: message.seed };
  while (grid.childElementCount > s.count) grid.lastChild.remove();
  while (grid.childElementCount < s.count) grid.append(el("img", { width: info.image.width, height: info.image.height }));
  const image = grid.children[message.index];
  image.src = pictures[message.index].url;
  image.alt = `${message.model}: ${s.prompt}, seed ${message.seed}`;
  image.dataset.request = message.id;
  const typed = message.model === "student" && keyed ? `, ${Math.round(performance.now() - keyed)} ms from the key` : "";
  const steps = message.model === "student" ? s.steps : info.teacher.steps;
  figure.querySelector(".time").textContent = `${steps} ${steps === 1 ? "step" : "steps"}, ${message.milliseconds.toFixed(0)} ms${typed}`;
}

function finish(message, request) {
  if (message.model === "teacher") {
    $("teacher").querySelector("progress").hidden = true;
    return;
  }
  const s = request.state;
  request.drawn = true;
  say("");
  $("download").disabled = false;
  clearTimeout(settled);
  // The history keeps what the typing came to, not every letter of it.
  settled = setTimeout(() => remember(s, shown.student[0].blob), PAUSE);
}

function remember(s, blob) {
  const key = JSON.stringify(s);
  if ($("history").firstChild?.dataset.key === key) return;
  const button = el("button", { type: "button", title: `${s.prompt} (seed ${s.seed}, ${s.steps} steps)` });
  button.dataset.key = key;
  const image = el("img", { src: URL.createObjectURL(blob), alt: `${s.prompt}, seed ${s.seed}` });
  button.append(image);
  button.onclick = () => { restore(s); ask(); };
  $("history").prepend(button);
  while ($("history").childElementCount > KEPT) {
    URL.revokeObjectURL($("history").lastChild.firstChild.src);
    $("history").lastChild.remove();
  }
}

function download() {
  const picture = shown.student[0];
  if (!picture) return;
  const name = picture.state.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || "picture";
  el("a", { href: picture.url, download: `${name}-${picture.seed}.png` }).click();
}

// ------------------------------------------------------------------------------------------- start

const toggle = (id) => { $(id).checked = !$(id).checked; ask(); };
const keys = { l: () => toggle("lock"), n: () => toggle("correction"), r: again, d: download };
document.addEventListener("keydown", (event) => {
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const digit = event.code.match(/^Digit([1-9])$/)?.[1];
  const act = digit && info.steps.includes(Number(digit)) ? () => { choose("steps", digit); ask(); } : keys[event.code.replace("Key", "").toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});

$("model").textContent = `${info.name}, jaxdistill ${info.version}`;
$("hint").textContent = info.hint;
$("caption").maxLength = info.max_prompt;
radios("steps", info.steps, (n) => String(n));
radios("counts", info.counts, (n) => String(n));
for (const text of info.examples) {
  $("examples").append(el("button", { type: "button", textContent: text, onclick: () => { $("caption").value = text; ask(); } }));
}
$("teacher").hidden = $("with-teacher-label").hidden = !info.teacher;
$("correction").disabled = !info.noise_correction.choice;
const first = { prompt: info.examples[0], steps: info.default_steps, count: 1, seed: newSeed(), correction: info.noise_correction.default, lock: true };
restore(fromFragment(first));
$("caption").addEventListener("input", () => ask());
$("caption").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); again(); }
});
for (const id of ["steps", "counts", "correction", "lock", "seed", "with-teacher"]) $(id).addEventListener("change", () => ask());
$("again").onclick = again;
$("download").onclick = download;
addEventListener("hashchange", () => { restore(fromFragment(state())); ask(); });
connect();
