"use strict";
// Curves by round, each with a line above it that reads the values under the pointer. The charts of
// a section have one zoom: by dragging, a double click or Escape back, or + and - on the keyboard.

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
  constructor(charts, title, format, fromZero) {
    this.charts = charts;
    this.fromZero = fromZero;
    this.format = format;
    this.figure = make("div", undefined, "chart");
    this.readout = make("div", undefined, "readout");
    this.plot = make("div", undefined, "plot");
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "img");
    this.title = title;
    this.figure.append(make("h3", title), this.readout, this.plot);
    charts.parent.append(this.figure);
    this.plot.addEventListener("dblclick", () => charts.zoomTo(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.at(null));
    this.shape = "";
  }

  draw(rounds, lines, values, band) {
    this.lines = lines;
    if (this.fromZero) this.top = topOf(values);
    const shape = JSON.stringify([lines, band, this.charts.isLog, document.documentElement.dataset.scheme]);
    const data = [rounds, ...(this.isLog() ? values.map((line) => line.map((value) => value > 0 ? value : null)) : values)];
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

  isLog() { return this.charts.isLog && !this.fromZero; }

  options(lines, band) {
    const axis = {
      stroke: colour("--soft"), font: "12px system-ui, sans-serif",
      grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, gap: 6,
    };
    return {
      width: Math.max(this.plot.clientWidth, 160), height: 190, legend: { show: false },
      scales: {
        x: { time: false, range: () => this.charts.zoom || rangeOf(this.charts.rounds) },
        ...(this.fromZero ? { y: { range: () => [0, this.top] } } : {}),
        ...(this.isLog() ? { y: { distr: 3, range: (u, low, high) => low > 0 ? [low / 1.15, high * 1.15] : [0.1, 1] } } : {}),
      },
      cursor: { drag: { x: true, y: false, setScale: false }, points: { size: 6 }, y: false },
      padding: [8, 20, 0, 0],
      axes: [
        { ...axis, size: 26, values: (u, ticks) => ticks.map(String), incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 1e5], grid: { show: false } },
        { ...axis, size: 58, values: (u, ticks) => ticks.map((tick) => tick === null ? "" : this.format(tick)) },
      ],
      series: [{}, ...lines.map((line) => ({
        label: "", stroke: line.colour, width: line.width === undefined ? 2 : line.width,
        dash: line.dash, points: line.width < 2 ? { show: false } : { size: 5 }, spanGaps: true,
      }))],
      bands: band ? [{ series: [2, 1], fill: band }] : [],
      hooks: { setCursor: [() => this.read()], setSelect: [(u) => this.select(u)] },
    };
  }

  // Zooms to what was dragged over, unless that is a click.
  select(u) {
    const { left, width } = u.select;
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    if (width >= 6) this.charts.zoomTo([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
  }

  // The values under the pointer; without one the last of each line, with its round where the line
  // is shorter than others, as of a run that ended or is behind.
  read() {
    const at = this.u && this.u.cursor.idx;
    const { data } = this.u, isLast = at === null || at === undefined, last = data[0].length - 1;
    const round = data[0][isLast ? last : at];
    this.readout.replaceChildren(make("span", `round ${round === undefined ? "–" : round}`));
    const main = (line) => line.isRun === true;
    const found = this.lines.map((line, k) => {
      const place = isLast ? placeOfLast(data[k + 1]) : at;
      return [line, place < 0 ? null : data[k + 1][place], place < 0 || place === last || !isLast ? "" : ` (round ${data[0][place]})`];
    });
    const sorted = found.filter(([line, value]) => line.readout !== false && (main(line) || (value !== null && value !== undefined)))
      .sort(([a], [b]) => main(b) - main(a));
    for (const [line, value, when] of sorted.slice(0, 12)) {
      const part = make("i", `${line.label} ${this.format(value)}${when}`);
      if (line.named !== false) part.style.setProperty("--c", line.ink || line.colour);
      this.readout.append(part);
    }
  }

  key(event) {
    const last = this.u.data[0].length - 1;
    const now = this.u.cursor.idx === null || this.u.cursor.idx === undefined ? last : this.u.cursor.idx;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") { this.at(null); this.charts.zoomTo(null); }
    if (event.key === "+" || event.key === "-") this.charts.zoomBy(event.key === "+" ? 0.5 : 2, this.u.data[0][now]);
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

function placeOfLast(values) {
  let place = values.length - 1;
  while (place >= 0 && (values[place] === null || values[place] === undefined)) place -= 1;
  return place;
}

function lastOf(values) {
  const place = placeOfLast(values);
  return place < 0 ? null : values[place];
}

function rangeOf(rounds) {
  const low = rounds[0], high = rounds[rounds.length - 1];
  return low === undefined ? [0, 1] : low === high ? [low - 1, high + 1] : [low, high];
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
  // onZoom(isZoomed): called when the zoom changes.
  constructor(parent, onZoom = () => {}) {
    this.parent = parent;
    this.onZoom = onZoom;
    this.zoom = null;   // [first, last] round that is shown, or all
    this.isLog = false;
    this.rounds = [];
    this.kept = new Map();
    new ResizeObserver(() => this.kept.forEach((chart) => chart.resize())).observe(parent);
  }

  // wanted: [{title, format, rounds, lines, values, band}]
  draw(wanted) {
    this.rounds = [...new Set(wanted.flatMap((each) => each.rounds))].sort((a, b) => a - b);
    const titles = new Set(wanted.map((each) => each.title));
    for (const [title, chart] of this.kept) {
      if (!titles.has(title)) { chart.remove(); this.kept.delete(title); }
    }
    for (const each of wanted) {
      if (!this.kept.has(each.title)) this.kept.set(each.title, new Chart(this, each.title, each.format, each.fromZero));
      this.kept.get(each.title).draw(each.rounds, each.lines, each.values, each.band);
    }
  }

  zoomTo(range) {
    this.zoom = range;
    for (const { u } of this.kept.values()) u.setData(u.data);
    this.onZoom(range !== null);
  }

  // A factor below 1 shows fewer rounds, around one of them.
  zoomBy(factor, center) {
    const [first, last] = rangeOf(this.rounds), [low, high] = this.zoom || [first, last];
    const width = (high - low) * factor;
    if (width >= last - first) { this.zoomTo(null); return; }
    const start = Math.min(last - width, Math.max(first, center - (center - low) * factor));
    if (width >= 1) this.zoomTo([start, start + width]);
  }
}
