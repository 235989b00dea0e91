"use strict";
// What the page knows of each run, taken in line by line as the history grows.
// Names of nodes become numbers at once: a thousand of them in a thousand rounds stay small.

const KINDS = ["evaluate", "central", "train"];
const TRAINED = 1, EVALUATED = 2, LATE = 4, FAILED = 8;

class Run {
  constructor(name) {
    this.name = name;
    this.settings = {};
    this.status = {};
    this.checkpoints = [];
    this.labels = null;
    this.summary = {};
    this.clear();
  }

  clear() {
    this.offset = 0;
    this.damaged = 0;
    this.rounds = [];       // {round, figures, spread, each, texts}
    this.places = new Map();  // a node's name to its number
    this.nodes = [];        // {name, trained, evaluated, late, failed, why, last}
    this.columns = [];      // of each round a Uint8Array: what each node did, by its number
    this.matrices = {};     // by metric, the last confusion matrix: {round, rows}
    this.own = {};          // by phase, the names of nodes whose own metrics are known
    this.reasons = new Map();  // those that are alike together: {count, phase, reason of the last}
    this.changed = true;
  }

  take(line) {
    if (!line.trim()) return;
    let record;
    try {
      record = parse(line);
      if (!Number.isInteger(record.round)) throw new TypeError("no round");
      this.add(record);
    } catch {
      this.damaged += 1;
    }
    this.changed = true;
  }

  add(record) {
    const trained = names((record.train || {}).nodes);
    const evaluated = names((record.evaluate || {}).nodes);
    const refused = [];
    for (const entry of record.refused || []) {
      for (const node of entry.nodes ? names(entry.nodes) : [entry.node]) {
        refused.push([String(node), String(entry.phase), String(entry.reason), entry.missing === true]);
      }
    }
    const did = new Map();
    for (const name of trained) {
      const place = this.place(name);
      this.nodes[place].trained += 1;
      did.set(place, (did.get(place) || 0) | TRAINED);
    }
    for (const name of evaluated) {
      const place = this.place(name);
      this.nodes[place].evaluated += 1;
      did.set(place, (did.get(place) || 0) | EVALUATED);
    }
    for (const [name, phase, reason, late] of refused) {
      const place = this.place(name);
      const node = this.nodes[place];
      node[late ? "late" : "failed"] += 1;
      node.why = `round ${record.round}, ${phase}: ${reason}`;
      did.set(place, (did.get(place) || 0) | (late ? LATE : FAILED));
      const alike = `${phase} ${reason.replace(/[0-9.]+/g, "#")}`;  // but for a time, a norm, a layer
      const seen = this.reasons.get(alike) || { count: 0, phase };
      seen.count += 1;
      seen.reason = reason;
      if (this.reasons.size < 200 || this.reasons.has(alike)) this.reasons.set(alike, seen);
    }
    const column = new Uint8Array(this.nodes.length);
    for (const [place, what] of did) column[place] = what;
    const each = record.each || {};
    for (const phase of Object.keys(each)) {
      for (const [name, own] of Object.entries(each[phase])) {
        (this.own[phase] = this.own[phase] || new Set()).add(name);
        this.nodes[this.place(name)].last = { ...this.nodes[this.place(name)].last, ...prefixed(phase, own) };
      }
    }
    const kept = {
      round: record.round, time: record.time, figures: figures(record), each,
      spread: record.spread || {}, texts: texts(record),
      counts: [trained.length, evaluated.length, refused.length],
      seconds: sum(record.seconds), bytes: sum(record.bytes),
    };
    for (const [name, rows] of matrices(record)) this.matrices[name] = { round: record.round, rows };
    // A round that was repeated stands in place of what came of it before.
    while (this.rounds.length && this.rounds[this.rounds.length - 1].round >= record.round) {
      this.rounds.pop();
      this.columns.pop();
    }
    this.rounds.push(kept);
    this.columns.push(column);
  }

  place(name) {
    let place = this.places.get(name);
    if (place === undefined) {
      place = this.nodes.length;
      this.places.set(name, place);
      this.nodes.push({ name, trained: 0, evaluated: 0, late: 0, failed: 0, why: "", last: {} });
    }
    return place;
  }

  // Places in the order of the names, numbers in them as numbers.
  order() {
    if (!this.ordered || this.ordered.length !== this.nodes.length) {
      const collator = new Intl.Collator("en", { numeric: true });
      this.ordered = this.nodes.map((_, place) => place)
        .sort((a, b) => collator.compare(this.nodes[a].name, this.nodes[b].name));
    }
    return this.ordered;
  }

  last() { return this.rounds[this.rounds.length - 1]; }

  // [least, quartile, median, quartile, most] of a metric among a round's nodes.
  spread(kept, metric) {
    const [kind, name] = split(metric);
    const known = (kept.spread[kind] || {})[name];
    if (Array.isArray(known)) return known;
    const values = Object.values(kept.each[kind] || {}).map((own) => own[name])
      .filter((value) => typeof value === "number").sort((a, b) => a - b);
    return values.length < 2 ? null : quantiles(values);
  }
}

// [least, quartile, median, quartile, most] of values in order.
function quantiles(values) {
  return [0, 0.25, 0.5, 0.75, 1].map((share) => {
    const at = share * (values.length - 1), low = Math.floor(at);
    return values[low] + (values[Math.ceil(at)] - values[low]) * (at - low);
  });
}

function parse(line) {
  try {
    return JSON.parse(line);
  } catch (error) {  // older histories have what JSON has not
    if (!/NaN|Infinity/.test(line)) throw error;
    return JSON.parse(line.replace(/(?<=[:[,]\s?)(NaN|-?Infinity)(?=\s?[,}\]])/g, "null"));
  }
}

// The names of {"node-": "0-3,5"}, or a list as it is.
function names(packed) {
  if (!packed) return [];
  if (Array.isArray(packed)) return packed.map(String);
  const found = [];
  for (const [prefix, ranges] of Object.entries(packed)) {
    for (const range of ranges.split(",")) {
      const [first, last] = range.split("-").map(Number);
      for (let k = first; k <= (last === undefined ? first : last) && found.length < 1e6; k++) {
        found.push(prefix + k);
      }
    }
  }
  return found;
}

function figures(record) {
  const found = {};
  for (const kind of [...KINDS, "seconds", "bytes"]) {
    Object.assign(found, prefixed(kind, record[kind] || {}));
  }
  return found;
}

// The confusion matrices of a record, as lists of rows; large ones are written as cells.
function matrices(record) {
  const found = [];
  for (const kind of KINDS) {
    for (const [name, value] of Object.entries(record[kind] || {})) {
      let rows = value;
      if (value && Array.isArray(value.cells) && value.classes <= 1000) {
        rows = Array.from({ length: value.classes }, () => new Array(value.classes).fill(0));
        for (let k = 0; k + 1 < value.cells.length; k += 2) {
          rows[Math.floor(value.cells[k] / value.classes)][value.cells[k] % value.classes] = value.cells[k + 1];
        }
      }
      const isMatrix = Array.isArray(rows) && rows.length > 1 && rows.every((row) => Array.isArray(row) && row.length === rows.length);
      if (isMatrix) found.push([`${kind}/${name}`, rows]);
    }
  }
  return found;
}

function sum(values) {
  return Object.values(values || {}).reduce((total, value) => total + (typeof value === "number" ? value : 0), 0);
}

function prefixed(kind, values) {
  const found = {};
  for (const [name, value] of Object.entries(values)) {
    if (typeof value === "number") found[`${kind}/${name}`] = value;
  }
  return found;
}

function texts(record) {
  return Object.entries(record.central || {}).filter(([, value]) => typeof value === "string");
}

function split(metric) {
  const at = metric.indexOf("/");
  return [metric.slice(0, at), metric.slice(at + 1)];
}

// The metrics of some runs, those that nodes or the server measured first.
function metricsOf(runs) {
  const found = new Set();
  for (const run of runs) {
    for (const kept of [...run.rounds.slice(0, 3), ...run.rounds.slice(-3)]) {
      for (const name of Object.keys(kept.figures)) found.add(name);
    }
  }
  return KINDS.flatMap((kind) => [...found].filter((name) => {
    const [own, metric] = split(name);
    return own === kind && !metric.startsWith("num-");
  }));
}

function flat(settings, prefix = "") {
  const found = [];
  for (const [key, value] of Object.entries(settings || {})) {
    if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
      found.push(...flat(value, `${prefix}${key}.`));
    } else if (key !== "run-id") {
      found.push([prefix + key, value]);
    }
  }
  return found;
}

// -- how values are written -----------------------------------------------------------------

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 10000 || size < 0.0001) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function bytes(value) {
  if (typeof value !== "number") return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (Math.abs(value) >= 1000 && unit < 4) { value /= 1000; unit += 1; }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

function seconds(value) {
  if (typeof value !== "number") return "–";
  if (value >= 3600) return `${Math.floor(value / 3600)} h ${Math.round(value % 3600 / 60)} min`;
  if (value >= 60) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return value >= 1 ? `${value.toFixed(1)} s` : `${Math.round(value * 1000)} ms`;
}
