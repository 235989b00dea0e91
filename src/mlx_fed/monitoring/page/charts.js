"use strict";
// Curves by round, each with a line above it that reads the values under the pointer.

const $ = (selector) => document.querySelector(selector);

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

class Chart {
  // lines: [{label, colour, width, dash, readout}], the first two of a band if there is one.
  constructor(parent, title, format, fromZero) {
    this.fromZero = fromZero;
    this.format = format;
    this.figure = make("div", undefined, "chart");
    this.readout = make("div", undefined, "readout");
    this.plot = make("div", undefined, "plot");
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "img");
    this.title = title;
    this.figure.append(make("h3", title), this.readout, this.plot);
    parent.append(this.figure);
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.at(null));
    this.shape = "";
  }

  draw(rounds, lines, values, band) {
    this.lines = lines;
    if (this.fromZero) this.top = topOf(values);
    const shape = JSON.stringify([lines, band, document.documentElement.dataset.scheme]);
    const data = [rounds, ...values];
    if (this.u && this.shape === shape) {
      this.u.setData(data);
    } else {
      this.shape = shape;
      if (this.u) this.u.destroy();
      this.u = new uPlot(this.options(lines, band), data, this.plot);
    }
    this.read();
    const said = lines.map((line, k) => line.readout === false ? "" : `${line.label} ${this.format(lastOf(values[k]))}`);
    this.plot.setAttribute("aria-label", `${this.title}, after round ${rounds[rounds.length - 1]}: ${said.filter(Boolean).slice(0, 8).join(", ")}. Left and right arrows go through the rounds.`);
  }

  options(lines, band) {
    const axis = {
      stroke: colour("--soft"), font: "12px system-ui, sans-serif",
      grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, gap: 6,
    };
    return {
      width: Math.max(this.plot.clientWidth, 160), height: 190, legend: { show: false },
      scales: {
        x: { time: false, range: (u, low, high) => low === high ? [low - 1, high + 1] : [low, high] },
        ...(this.fromZero ? { y: { range: () => [0, this.top] } } : {}),
      },
      cursor: { drag: { x: true, y: false }, points: { size: 6 }, y: false },
      padding: [8, 20, 0, 0],
      axes: [
        { ...axis, size: 26, values: (u, ticks) => ticks.map(String), incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 1e5], grid: { show: false } },
        { ...axis, size: 58, values: (u, ticks) => ticks.map((tick) => this.format(tick)) },
      ],
      series: [{}, ...lines.map((line) => ({
        label: "", stroke: line.colour, width: line.width === undefined ? 2 : line.width,
        dash: line.dash, points: line.width < 2 ? { show: false } : { size: 5 }, spanGaps: true,
      }))],
      bands: band ? [{ series: [2, 1], fill: band }] : [],
      hooks: { setCursor: [() => this.read()] },
    };
  }

  read() {
    const at = this.u && this.u.cursor.idx;
    const data = this.u.data, place = at === null || at === undefined ? data[0].length - 1 : at;
    this.readout.replaceChildren(make("span", `round ${data[0][place] === undefined ? "–" : data[0][place]}`));
    const main = (line) => line.width === 2;
    const sorted = this.lines.map((line, k) => [line, data[k + 1][place]])
      .filter(([line, value]) => line.readout !== false && value !== null && value !== undefined)
      .sort(([a], [b]) => main(b) - main(a));
    for (const [line, value] of sorted.slice(0, 12)) {
      const part = make("i", `${line.label} ${this.format(value)}`);
      if (line.named !== false) part.style.setProperty("--c", line.colour);
      this.readout.append(part);
    }
  }

  key(event) {
    const last = this.u.data[0].length - 1;
    const now = this.u.cursor.idx === null || this.u.cursor.idx === undefined ? last : this.u.cursor.idx;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.at(null);
    if (to === undefined) return;
    event.preventDefault();
    this.at(Math.min(last, Math.max(0, to)));
  }

  at(place) {
    if (!this.u) return;
    const left = place === null ? -10 : this.u.valToPos(this.u.data[0][place], "x");
    this.u.setCursor({ left, top: place === null ? -10 : 20 });
  }

  resize() {
    if (this.u) this.u.setSize({ width: Math.max(this.plot.clientWidth, 160), height: 190 });
  }

  remove() {
    if (this.u) this.u.destroy();
    this.figure.remove();
  }
}

function lastOf(values) {
  for (let k = values.length - 1; k >= 0; k--) if (values[k] !== null && values[k] !== undefined) return values[k];
  return null;
}

// The top of an axis: all there is, but for the few that would flatten the rest, such as the seconds
// of a first round, in which programs are compiled. They run off the chart, and are read above it.
function topOf(values) {
  const most = values[0].map((_, k) => Math.max(...values.map((line) => line[k] || 0))).sort((a, b) => a - b);
  const usual = most[Math.floor(0.95 * (most.length - 1))], highest = most[most.length - 1];
  return (highest > 4 * usual && usual > 0 ? 1.5 * usual : highest) * 1.08 || 1;
}

// The charts of a section, kept by their titles from one drawing to the next.
class Charts {
  constructor(parent) {
    this.parent = parent;
    this.kept = new Map();
    new ResizeObserver(() => this.kept.forEach((chart) => chart.resize())).observe(parent);
  }

  // wanted: [{title, format, rounds, lines, values, band}]
  draw(wanted) {
    const titles = new Set(wanted.map((each) => each.title));
    for (const [title, chart] of this.kept) {
      if (!titles.has(title)) { chart.remove(); this.kept.delete(title); }
    }
    for (const each of wanted) {
      if (!this.kept.has(each.title)) this.kept.set(each.title, new Chart(this.parent, each.title, each.format, each.fromZero));
      this.kept.get(each.title).draw(each.rounds, each.lines, each.values, each.band);
    }
  }
}

// What a metric's chart shows: a line for each run; of one alone its nodes as well.
function curve(metric, runs, colours) {
  const [kind, name] = split(metric);
  const title = { train: "Training", evaluate: "Evaluation", central: "On the server" }[kind] + ` · ${name}`;
  const rounds = [...new Set(runs.flatMap((run) => run.rounds.map((kept) => kept.round)))].sort((a, b) => a - b);
  const by = runs.map((run) => new Map(run.rounds.map((kept) => [kept.round, kept])));
  const lines = [], values = [];
  let band;
  const add = (line, of) => { lines.push(line); values.push(of); };
  if (runs.length === 1 && kind !== "central") {
    const spreads = rounds.map((round) => runs[0].spread(by[0].get(round), metric));
    const soft = colour("--soft");
    if (spreads.some(Boolean)) {
      const quartile = (k) => spreads.map((found) => found && found[k]);
      band = colours[0] + "26";
      add({ label: "quartiles", colour: colours[0] + "00", width: 0, readout: false }, quartile(1));
      add({ label: "", colour: colours[0] + "00", width: 0, readout: false }, quartile(3));
    }
    // Many that take turns would be a tangle: then the band says more.
    const own = [...runs[0].own[kind] || []];
    for (const node of own.length <= 32 ? own : []) {
      add({ label: node, colour: soft + "66", width: 1, named: false, readout: own.length <= 4 },
        rounds.map((round) => { const value = ((by[0].get(round).each[kind] || {})[node] || {})[name]; return value === undefined ? null : value; }));
    }
    if (spreads.some(Boolean)) {
      add({ label: "median", colour: colours[0], width: 1, dash: [4, 3] }, spreads.map((found) => found && found[2]));
    }
  }
  runs.forEach((run, k) => {
    add({ label: runs.length > 1 ? run.name : "all", colour: colours[k], width: 2 },
      rounds.map((round) => { const kept = by[k].get(round); const value = kept && kept.figures[metric]; return value === undefined ? null : value; }));
  });
  return { title, format: number, rounds, lines, values, band };
}

// Seconds or bytes of one run, a line for each of their names.
function costs(run, kind, title, format) {
  const all = new Set();
  for (const kept of run.rounds) for (const name in kept.figures) all.add(name);
  const known = [...all].filter((name) => split(name)[0] === kind);
  return {
    title, format, fromZero: true, rounds: run.rounds.map((kept) => kept.round),
    lines: known.map((name, k) => ({ label: split(name)[1], colour: colour(`--run-${k % 8}`), width: 2 })),
    values: known.map((name) => run.rounds.map((kept) => kept.figures[name] === undefined ? null : kept.figures[name])),
  };
}
