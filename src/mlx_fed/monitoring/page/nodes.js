"use strict";
// Which node did what in which round, as a map of cells and a table; and who was not let in.

// From nothing to what most needs to be seen; a pixel shows the most of what falls on it.
const CELLS = ["not asked", "evaluated", "trained", "trained and evaluated", "no reply in time", "failed or refused"];
const CELL_OF = Uint8Array.from({ length: 16 }, (_, what) =>
  what & FAILED ? 5 : what & LATE ? 4 : { [TRAINED | EVALUATED]: 3, [TRAINED]: 2, [EVALUATED]: 1 }[what] || 0);

class NodeMap extends CellMap {
  constructor() {
    super($("#map canvas"), $("#cell"), "A row is a node, a column a round.");
    const key = $("#key");
    for (let cell = 1; cell < CELLS.length; cell++) {
      const part = make("span", CELLS[cell]);
      part.style.setProperty("--c", `var(--cell-${cell})`);
      key.append(part);
    }
  }

  draw(run) {
    this.run = run;
    this.rows = run.nodes.length;
    this.columns = run.columns.length;
    if (this.rows && this.columns) this.paint();
  }

  paint() {
    const { run, rows: nodes, columns: rounds } = this;
    const context = this.open(Math.max(14, Math.min(360, nodes * 14)));
    if (!context) return;
    // A pixel for each cell, or for several where there are more cells than pixels.
    const across = Math.min(rounds, this.canvas.width), down = Math.min(nodes, this.canvas.height);
    const start = new Int32Array(nodes);  // of each node's line of pixels
    run.order().forEach((place, row) => { start[place] = Math.floor(row * down / nodes) * across; });
    const most = new Uint8Array(across * down);
    for (let round = 0; round < rounds; round++) {
      const column = run.columns[round], x = Math.floor(round * across / rounds);
      for (let place = 0; place < column.length; place++) {
        const cell = CELL_OF[column[place]];
        if (cell > most[start[place] + x]) most[start[place] + x] = cell;
      }
    }
    const colours = CELLS.map((_, cell) => packed(pixel(`--cell-${cell}`)));
    const pixels = new Uint32Array(most.length);
    for (let k = 0; k < most.length; k++) pixels[k] = colours[most[k]];
    this.put(context, pixels, across, down);
    this.canvas.setAttribute("aria-label", `${nodes} nodes, one a row, by ${rounds} rounds. Arrows go from cell to cell.`);
  }

  tell(row, column) {
    const { run } = this, place = run.order()[row], node = run.nodes[place];
    if (!node || !run.columns[column]) return this.rest;  // the run has begun anew since it was drawn
    const cell = CELL_OF[run.columns[column][place] || 0];
    return `${node.name}, round ${run.rounds[column].round}: ${CELLS[cell]}` +
      (node.why ? `  (last: ${node.why})` : "");
  }
}

// Why nodes are kept out of the run, by their names: by the roll call, or after many refusals.
function keptOut(run) {
  const refused = run.status.refused;
  return refused && typeof refused === "object" ? Object.entries(refused) : [];
}

// Who was left out of the round that goes on, or that the run stopped in: it has no record yet.
function leftOutNow(run) {
  const { failed, round } = run.status, over = run.rounds.length && run.last().round >= round;
  return Array.isArray(failed) && !over && run.status.state !== "finished" ? failed : [];
}

// The clients that come first by trouble, then by name; a thousand rows would help nobody.
function nodeRows(run, wanted) {
  const out = new Map(keptOut(run));
  const known = run.order().map((place) => run.nodes[place]);
  const strangers = [...out.keys()].filter((name) => !run.places.has(name))
    .map((name) => ({ name, trained: 0, evaluated: 0, late: 0, failed: 0, why: "", last: {} }));
  const found = [...strangers, ...known]
    .map((node) => out.has(node.name) ? { ...node, why: `not let in: ${out.get(node.name)}` } : node)
    .filter((node) => node.name.toLowerCase().includes(wanted.toLowerCase()));
  const trouble = (node) => (out.has(node.name) ? 1e9 : 0) + node.late + node.failed;
  return found.sort((a, b) => trouble(b) - trouble(a)).slice(0, 60);
}

function drawNodes(run, wanted) {
  const table = $("#nodes");
  const shown = nodeRows(run, wanted);
  const metrics = [...new Set(shown.flatMap((node) => Object.keys(node.last)))]
    .filter((name) => !name.includes("/num-")).slice(0, 6);
  const head = document.createElement("tr");
  head.append(make("th", "node"));
  for (const name of ["trained", "evaluated", "no reply", "failed", ...metrics]) head.append(make("th", name, "n"));
  head.append(make("th", "last left out"));
  const rows = shown.map((node) => {
    const row = document.createElement("tr");
    row.append(make("td", node.name, "text"));
    for (const name of ["trained", "evaluated", "late", "failed"]) row.append(make("td", number(node[name]), "n"));
    for (const name of metrics) row.append(make("td", number(node.last[name]), "n"));
    row.append(make("td", node.why, "text"));
    return row;
  });
  table.replaceChildren(head, ...rows);
}

function drawReasons(run) {
  const out = keptOut(run);
  const kept = out.slice(0, 12).map(([name, reason]) => make("p", `${name} is not let in: ${reason}`));
  if (out.length > 12) kept.push(make("p", `${number(out.length - 12)} more are not let in.`));
  const now = new Map();
  for (const { node, phase, reason } of leftOutNow(run)) {
    const same = `left out of round ${run.status.round}, ${phase}: ${reason}`;
    now.set(same, [...(now.get(same) || []), node]);
  }
  kept.push(...[...now].slice(0, 12).map(([same, nodes]) =>
    make("p", `${nodes.length > 3 ? `${number(nodes.length)} nodes` : nodes.join(", ")} ${same}`)));
  const sorted = [...run.reasons.values()].sort((a, b) => b.count - a.count).slice(0, 12);
  $("#reasons").replaceChildren(...kept, ...sorted.map(({ count, phase, reason }) =>
    make("p", `${number(count)} × ${phase}: ${reason}`)));
}
