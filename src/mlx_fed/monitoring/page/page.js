"use strict";
// The page: which runs are shown, where they come from, and what is drawn when they change.

const given = JSON.parse($("#data").textContent);
const MOST_SHOWN = 8, MOST_LISTED = 30;

const runs = new Map();  // by name, the newest first
let chosen = [];         // names, in the order of their colours
let listed = MOST_LISTED, picked = false;
let map, labelMap, confusionMap, table, curves, costCharts, drawing = 0;

function colours() { return chosen.map((_, k) => colour(`--run-${k % 8}`)); }
function shown() { return chosen.map((name) => runs.get(name)).filter(Boolean); }

// -- drawing -----------------------------------------------------------------------------------

function draw() {
  document.documentElement.dataset.scheme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const found = shown(), focus = found[0], later = [];
  drawNow(focus);
  drawRuns();
  const withRounds = found.filter((run) => run.rounds.length);
  section("#s-curves", withRounds.length, () => {
    const palette = colours().filter((_, k) => found[k].rounds.length);
    curves.draw(metricsOf(withRounds).map((metric) => curve(metric, withRounds, palette, Number($("#smoothing").value))));
  });
  section("#s-nodes", focus && (focus.nodes.length + keptOut(focus).length + leftOutNow(focus).length), () => {
    $("#h-nodes small").textContent = `${number(focus.nodes.length)} of ${focus.name}`;
    later.push(() => map.draw(focus));
    drawReasons(focus);
    if ($("#s-nodes details").open) drawNodes(focus, $("#find").value);
  });
  section("#s-confusion", focus && Object.keys(focus.matrices).length, () => later.push(() => drawConfusion(focus)));
  section("#s-costs", focus && focus.rounds.length, () => {
    $("#h-costs small").textContent = `of ${focus.name}`;
    later.push(() => costCharts.draw([
      costs(focus, "seconds", "Seconds by phase", seconds), costs(focus, "bytes", "Arrays sent and received", bytes),
    ].filter((each) => each.lines.length)));
  });
  section("#s-labels", focus && focus.labels && focus.labels.clients.length, () => {
    const { clients, of } = focus.labels, some = of > clients.length ? `${number(clients.length)} of ${number(of)} clients, those that took part first, in` : `${number(clients.length)} clients of`;
    $("#h-labels small").textContent = `${some} ${focus.name}`;
    later.push(() => labelMap.draw(focus.labels));
  });
  section("#s-settings", found.some((run) => Object.keys(run.settings).length), () => drawSettings(found));
  section("#s-notes", focus, () => drawNotes(focus));
  inFrames(later);
}

function drawConfusion(focus) {
  const names = Object.keys(focus.matrices), select = $("#matrix");
  if (names.join() !== [...select.options].map((option) => option.value).join()) {
    select.replaceChildren(...names.map((name) => make("option", name)));
  }
  select.parentElement.parentElement.hidden = names.length < 2;
  const { round, rows } = focus.matrices[select.value];
  const said = confusionMap.draw(rows);
  $("#h-confusion small").textContent = `${select.value} of ${focus.name} after round ${round}: ${said}`;
}

// One step a frame, so that the page reacts between them; a later drawing takes the place of what is
// left of the one before.
function inFrames(steps) {
  const mine = drawing += 1;
  const next = () => {
    if (mine !== drawing || !steps.length) return;
    steps.shift()();
    requestAnimationFrame(next);
  };
  requestAnimationFrame(next);
}

function section(selector, is, fill) {
  $(selector).hidden = !is;
  if (is) fill();
}

function drawNow(focus) {
  const now = $("#now"), bar = $("#bar");
  now.replaceChildren();
  bar.hidden = true;
  document.title = "mlx-fed";
  if (!focus) { now.textContent = runs.size ? "No run is selected." : given.live ? "No run yet: this page shows it as it starts." : "No runs."; return; }
  const { status } = focus, done = focus.rounds.length ? focus.last().round : 0;
  now.append(make("b", focus.name), make("span", `  ${stateOf(focus)}`));
  if (status.state === "running" || status.state === "waiting") {
    let text = status.state === "waiting" && status.nodes !== undefined ? `, ${status.nodes} of ${status.of} nodes` : "";
    if (status.phase) {
      const left = status.seconds_left;
      text = `, round ${status.round} of ${status.of}: ${status.phase}` +
        (status.nodes ? `, ${number(status.answered)} of ${number(status.nodes)} nodes` : "") +
        (typeof left === "number" ? `, about ${seconds(left)} left` : "");
      bar.hidden = false;
      bar.firstElementChild.style.width = `${100 * done / status.of}%`;
      document.title = `${done}/${status.of} ${focus.name}`;
    }
    now.append(make("span", text));
  } else if (status.reason) {
    now.append(make("span", `: ${status.reason}`));
  }
  const damaged = shown().filter((run) => run.damaged);
  const problem = $("#problem");
  problem.hidden = !damaged.length;
  problem.textContent = damaged.map((run) => `${run.name}: ${run.damaged} damaged ${run.damaged === 1 ? "line" : "lines"} of history.jsonl left out.`).join(" ");
}

function stateOf(run) { return run.status.state || "recorded"; }

function drawRuns() {
  table.draw([...runs.values()], chosen, listed);
  const more = $("#more-runs");
  more.hidden = runs.size <= listed;
  more.textContent = `${runs.size - listed} more`;
}

function choose(name, is) {
  picked = true;
  chosen = is ? [...chosen.filter((other) => other !== name), name].slice(-MOST_SHOWN) : chosen.filter((other) => other !== name);
  draw();
  if (given.live) poll();
}

function drawSettings(found) {
  const each = found.map((run) => new Map(flat(run.settings)));
  const all = [...new Set(each.flatMap((settings) => [...settings.keys()]))];
  const write = (value) => value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const differs = all.filter((name) => each.some((settings) => write(settings.get(name)) !== write(each[0].get(name))));
  const rows = (names) => {
    const head = document.createElement("tr");
    head.append(make("th", names === differs ? "differs in" : "setting"), ...found.map((run) => make("th", run.name)));
    return [head, ...names.map((name) => {
      const row = document.createElement("tr");
      row.append(make("td", name), ...each.map((settings) => make("td", write(settings.get(name)), "text")));
      return row;
    })];
  };
  $("#differences").replaceChildren(...(differs.length ? rows(differs) : []));
  $("#settings").replaceChildren(...rows(all));
}

function drawNotes(focus) {
  $("#h-notes small").textContent = `in ${focus.name}`;
  $("#checkpoints").textContent = focus.checkpoints.length
    ? `Checkpoints after ${focus.checkpoints.length === 1 ? "round" : "rounds"} ${focus.checkpoints.join(", ")}.`
    : "No checkpoints.";
  const last = [...focus.rounds].reverse().find((kept) => kept.texts.length);
  $("#texts").replaceChildren(...(last ? last.texts : []).flatMap(([name, text]) =>
    [make("h3", `${name}, round ${last.round}`), make("pre", text)]));
  $("#notices").replaceChildren(...[...(focus.status.notices || [])].reverse().map((notice) => {
    const item = make("li"), time = make("time", new Date(notice.time * 1000).toLocaleTimeString());
    const text = [notice.node, notice.event === "note" ? "" : notice.event].filter(Boolean).join(" ");
    item.append(time, make("span", [text, notice.reason || notice.text].filter(Boolean).join(": ")));
    return item;
  }));
}

// -- where runs come from ------------------------------------------------------------------

function takeAbout(run, about) {
  for (const key of ["settings", "status", "checkpoints", "labels", "summary"]) {
    if (about[key] !== undefined && about[key] !== null) run[key] = about[key];
  }
}

function fromReport() {
  for (const about of given.runs) {
    const run = new Run(about.name);
    takeAbout(run, about);
    for (const line of about.lines) run.take(line);
    run.damaged += about.damaged;
    runs.set(run.name, run);
  }
  chosen = [...runs.keys()].slice(0, MOST_SHOWN);
  $("#foot").textContent = `Written ${new Date(given.time * 1000).toLocaleString()} by mlx-fed ${given.version}.`;
  draw();
}

const LIST = 3;  // of how many questions one is for the list of runs
let polling = false, again = false, failures = 0, asked = 0;

async function poll() {
  if (polling) { again = true; return; }
  polling = true;
  try {
    let changed = (!runs.size || asked % LIST === 0) && await list();
    asked += 1;
    for (const run of shown()) changed = await follow(run) || changed;
    if (failures) changed = true;
    failures = 0;
    if (changed) draw();
  } catch {
    failures += 1;
    if (failures > 1) $("#now").textContent = "The dashboard does not answer: it has ended, or will be back.";
  }
  polling = false;
  if (again) { again = false; poll(); }
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok && answer.status !== 404) throw new Error(answer.statusText);
  return answer.ok ? answer.json() : null;
}

let before = "";
async function list() {
  const found = (await ask("api/runs")).runs;
  const now = JSON.stringify(found);
  if (now === before) return false;
  before = now;
  const known = new Map(runs);
  runs.clear();
  for (const { name, state, settings, summary } of found) {
    const run = known.get(name) || new Run(name);
    run.summary = summary;
    if (!chosen.includes(name)) run.settings = { ...run.settings, ...settings };
    if (!run.status.state) run.status = { state };
    if (!chosen.includes(name)) run.status = { ...run.status, state };
    runs.set(name, run);
  }
  chosen = chosen.filter((name) => runs.has(name));
  // Whoever has chosen nothing sees the newest.
  if (!picked && runs.size) chosen = [runs.keys().next().value];
  return true;
}

async function follow(run) {
  let changed = false;
  for (let more = true; more;) {
    const path = `api/runs/${encodeURIComponent(run.name)}?start=${run.offset}&file_id=${encodeURIComponent(run.fileId || "")}&labels=${encodeURIComponent(run.labelsVersion || "")}`;
    const about = await ask(path);
    if (!about) return changed;
    if (about.reset) { run.clear(); changed = true; }
    const said = JSON.stringify([about.status, about.settings, about.checkpoints, about.labels_version]);
    if (said !== run.said || about.lines.length) changed = true;
    run.said = said;
    takeAbout(run, about);
    for (const line of about.lines) run.take(line);
    run.offset = about.end;
    run.fileId = about.file_id;
    run.labelsVersion = about.labels_version;
    more = about.more;
  }
  return changed;
}

function tick() {
  if (!document.hidden) poll();
}

// -- start ---------------------------------------------------------------------------------

map = new NodeMap();
labelMap = new LabelMap();
confusionMap = new ConfusionMap();
table = new RunTable($("#runs"), $("#best"), choose);
curves = new Charts($("#curves"), (isZoomed) => { $("#all-rounds").hidden = !isZoomed; });
costCharts = new Charts($("#costs"));
$("#more-runs").addEventListener("click", () => { listed += MOST_LISTED; draw(); });
$("#best").addEventListener("change", drawRuns);
$("#log").addEventListener("change", (event) => { curves.isLog = event.target.checked; draw(); });
$("#smoothing").addEventListener("input", (event) => { $("output").textContent = event.target.value; draw(); });
$("#all-rounds").addEventListener("click", () => { curves.zoomTo(null); $("#curves .plot").focus(); });
$("#matrix").addEventListener("change", draw);
$("#find").addEventListener("input", (event) => drawNodes(shown()[0], event.target.value));
$("#s-nodes details").addEventListener("toggle", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
if (given.live) {
  document.addEventListener("visibilitychange", tick);
  setInterval(tick, given.pause * 1000);
  poll();
} else {
  fromReport();
}
