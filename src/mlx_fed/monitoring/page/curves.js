"use strict";
// Which lines the charts show: metrics of runs and nodes, seconds and bytes.

// What a metric's chart shows: a line for each run; of one alone its nodes as well.
function curve(metric, runs, colours, smoothing = 0) {
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
    const free = Array.from({ length: 8 }, (_, k) => colour(`--run-${k}`)).filter((other) => other !== colours[0]);
    const isFew = own.length <= free.length;
    own.sort(new Intl.Collator("en", { numeric: true }).compare);
    for (const [k, node] of (own.length <= 32 ? own : []).entries()) {
      add({ label: node, colour: isFew ? free[k] : soft + "66", width: isFew ? 1.25 : 1, named: isFew, readout: isFew },
        rounds.map((round) => { const value = ((by[0].get(round).each[kind] || {})[node] || {})[name]; return value === undefined ? null : value; }));
    }
    if (spreads.some(Boolean)) {
      add({ label: "median", colour: colours[0], width: 1, dash: [4, 3] }, spreads.map((found) => found && found[2]));
    }
  }
  runs.forEach((run, k) => {
    const exact = rounds.map((round) => { const kept = by[k].get(round); const value = kept && kept.figures[metric]; return value === undefined ? null : value; });
    const label = runs.length > 1 ? run.name : "all";
    if (smoothing) add({ label, colour: colours[k], width: 2.5, readout: false }, smooth(exact, smoothing));
    // Values are read from the exact line, which is faint beside the smooth one.
    add({ label, colour: colours[k] + (smoothing ? "59" : ""), ink: colours[k], width: smoothing ? 1 : 2, isRun: true }, exact);
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

// Exponential moving average of the values that there are, without the bias of its start.
function smooth(values, weight) {
  let mean = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}
