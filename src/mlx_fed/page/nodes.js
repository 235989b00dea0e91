"use strict";
// Which node did what in which round, as a map of cells; and labels by client, likewise.

// From nothing to what most needs to be seen; a pixel shows the most of what falls on it.
const CELLS = ["not asked", "evaluated", "trained", "trained and evaluated", "too late", "failed or refused"];

function cellOf(what) {
  if (what & FAILED) return 5;
  if (what & LATE) return 4;
  return { [TRAINED | EVALUATED]: 3, [TRAINED]: 2, [EVALUATED]: 1 }[what] || 0;
}

function rgba(value) {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  context.fillStyle = value;
  context.fillRect(0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data;
}

class NodeMap {
  constructor() {
    this.canvas = document.querySelector("#map canvas");
    this.said = document.querySelector("#cell");
    this.at = null;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.show(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.run && this.draw(this.run)).observe(this.canvas.parentElement);
    const key = document.querySelector("#key");
    for (let cell = 1; cell < CELLS.length; cell++) {
      const part = make("span", CELLS[cell]);
      part.style.setProperty("--c", `var(--cell-${cell})`);
      key.append(part);
    }
  }

  draw(run) {
    this.run = run;
    const nodes = run.nodes.length, rounds = run.columns.length;
    const width = this.canvas.parentElement.clientWidth;
    if (!nodes || !rounds || !width) return;
    const ratio = window.devicePixelRatio || 1;
    const height = Math.max(14, Math.min(360, nodes * 14));
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    // A pixel for each cell, or for several where there are more cells than pixels.
    const across = Math.min(rounds, this.canvas.width), down = Math.min(nodes, this.canvas.height);
    const most = new Uint8Array(across * down);
    run.order().forEach((place, row) => {
      const y = Math.floor(row * down / nodes) * across;
      for (let round = 0; round < rounds; round++) {
        const column = run.columns[round];
        if (place >= column.length || !column[place]) continue;
        const x = y + Math.floor(round * across / rounds), cell = cellOf(column[place]);
        if (cell > most[x]) most[x] = cell;
      }
    });
    const colours = CELLS.map((_, cell) => rgba(colour(`--cell-${cell}`)));
    const image = new ImageData(across, down);
    for (let k = 0; k < most.length; k++) image.data.set(colours[most[k]], k * 4);
    const cells = document.createElement("canvas");
    cells.width = across; cells.height = down;
    cells.getContext("2d").putImageData(image, 0, 0);
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(cells, 0, 0, this.canvas.width, this.canvas.height);
    context.fillStyle = colour("--paper");  // gaps between cells that are large enough for them
    const w = this.canvas.width / rounds, h = this.canvas.height / nodes;
    if (w >= 6) for (let k = 1; k < rounds; k++) context.fillRect(Math.round(k * w), 0, ratio, this.canvas.height);
    if (h >= 6) for (let k = 1; k < nodes; k++) context.fillRect(0, Math.round(k * h), this.canvas.width, ratio);
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `${nodes} nodes, one a row, by ${rounds} rounds. Arrows go from cell to cell.`);
    if (!this.at) this.show(null);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / box.height * this.run.nodes.length);
    const round = Math.floor((event.clientX - box.left) / box.width * this.run.columns.length);
    this.show([row, round]);
  }

  key(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [row, round] = this.at || [0, 0];
    this.show([row + step[0], round + step[1]]);
  }

  show(at) {
    this.at = at;
    if (!at) {
      this.said.textContent = "A row is a node, a column a round.";
      return;
    }
    const run = this.run, clip = (value, most) => Math.min(most - 1, Math.max(0, value));
    const row = clip(at[0], run.nodes.length), round = clip(at[1], run.columns.length);
    this.at = [row, round];
    const place = run.order()[row], node = run.nodes[place];
    const cell = cellOf(run.columns[round][place] || 0);
    this.said.textContent = `${node.name}, round ${run.rounds[round].round}: ${CELLS[cell]}` +
      (node.why ? `  (last: ${node.why})` : "");
  }
}

// The clients that come first by trouble, then by name; a thousand rows would help nobody.
function nodeRows(run, wanted) {
  const found = run.order().map((place) => run.nodes[place])
    .filter((node) => node.name.toLowerCase().includes(wanted.toLowerCase()));
  const trouble = (node) => node.late + node.failed;
  return found.sort((a, b) => trouble(b) - trouble(a)).slice(0, 60);
}

function drawNodes(run, wanted) {
  const table = document.querySelector("#nodes");
  const shown = nodeRows(run, wanted);
  const metrics = [...new Set(shown.flatMap((node) => Object.keys(node.last)))]
    .filter((name) => !name.includes("/num-")).slice(0, 6);
  const head = document.createElement("tr");
  head.append(make("th", "node"));
  for (const name of ["trained", "evaluated", "late", "failed", ...metrics]) head.append(make("th", name, "n"));
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
  const parent = document.querySelector("#reasons");
  const sorted = [...run.reasons].sort((a, b) => b[1].count - a[1].count).slice(0, 12);
  parent.replaceChildren(...sorted.map(([reason, { count, phase }]) =>
    make("p", `${number(count)} × ${phase}: ${reason}`)));
}

// -- labels ------------------------------------------------------------------------------------

class LabelMap {
  constructor() {
    this.canvas = document.querySelector("#labels canvas");
    this.said = document.querySelector("#label-cell");
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => { this.said.textContent = this.rest; });
    new ResizeObserver(() => this.labels && this.draw(this.labels)).observe(this.canvas.parentElement);
  }

  // labels: {classes: [...], clients: [[client, [count, ...]], ...]}
  draw(labels) {
    this.labels = labels;
    const width = this.canvas.parentElement.clientWidth, ratio = window.devicePixelRatio || 1;
    const clients = labels.clients.length, classes = labels.classes.length;
    if (!width || !clients || !classes) return;
    const height = Math.max(28, Math.min(280, classes * 16));
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const [red, green, blue] = rgba(colour("--accent"));
    const across = Math.min(clients, this.canvas.width);
    const image = new ImageData(across, classes);
    labels.clients.forEach(([, counts], client) => {
      const total = counts.reduce((sum, count) => sum + count, 0) || 1;
      const x = Math.floor(client * across / clients);
      counts.forEach((count, y) => {
        const at = (y * across + x) * 4;
        const strength = Math.max(image.data[at + 3], 255 * Math.sqrt(count / total));
        image.data.set([red, green, blue, strength], at);
      });
    });
    const cells = document.createElement("canvas");
    cells.width = across; cells.height = classes;
    cells.getContext("2d").putImageData(image, 0, 0);
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(cells, 0, 0, this.canvas.width, this.canvas.height);
    this.rest = "A column is a client, a row a label; the darker, the larger its share of the client's examples.";
    this.said.textContent = this.rest;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `Labels of ${clients} clients, ${classes} classes`);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect(), { classes, clients } = this.labels;
    const at = (part, count) => Math.min(count - 1, Math.max(0, Math.floor(part * count)));
    const [client, counts] = clients[at((event.clientX - box.left) / box.width, clients.length)];
    const label = at((event.clientY - box.top) / box.height, classes.length);
    this.said.textContent = `client ${client}: ${number(counts[label])} examples of label ${classes[label]}`;
  }
}
