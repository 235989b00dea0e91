"use strict";
// The table of runs: a row for each, sorted by any column, with last or best metrics.

const RUN_METRICS = 5;

class RunTable {
  // choose(name, is): called when a run is selected or deselected.
  constructor(table, best, choose) {
    this.table = table;
    this.best = best;  // the select element: "best" or "last"
    this.choose = choose;
    this.sort = null;  // [column's name, whether descending]; null is the newest first
  }

  columns(shown, all) {
    const names = [...new Set([...shown, ...all].flatMap((run) => Object.keys(run.summary.metrics || {})))];
    const metrics = KINDS.flatMap((kind) => names.filter((name) => split(name)[0] === kind)).slice(0, RUN_METRICS);
    const isBest = this.best.value === "best";
    return [
      { name: "run", value: (run) => run.name },
      { name: "state", value: (run) => stateOf(run) },
      { name: "rounds", isNumber: true, value: (run) => run.summary.rounds, text: (run) => `${run.summary.rounds || 0}${run.settings.num_rounds ? ` of ${run.settings.num_rounds}` : ""}` },
      { name: "strategy", value: (run) => (run.settings.strategy || {}).name || "" },
      ...metrics.map((metric) => {
        const row = (run) => (run.summary.metrics || {})[metric] || [];
        return {
          name: metric.replace("/", " "), isNumber: true, value: (run) => row(run)[isBest ? 1 : 0],
          text: (run) => row(run).length ? `${number(row(run)[isBest ? 1 : 0])}${isBest ? ` @ ${row(run)[2]}` : ""}` : "",
        };
      }),
      { name: "duration", isNumber: true, value: (run) => run.summary.seconds, text: (run) => run.summary.rounds ? seconds(run.summary.seconds) : "" },
      { name: "traffic", isNumber: true, value: (run) => run.summary.bytes, text: (run) => run.summary.rounds ? bytes(run.summary.bytes) : "" },
    ];
  }

  // The runs in the order of the table; those without a value come last.
  sorted(all, columns) {
    const column = this.sort && columns.find(({ name }) => name === this.sort[0]);
    if (!column) return all;
    const sign = this.sort[1] ? -1 : 1, collator = new Intl.Collator("en", { numeric: true });
    const isMissing = (value) => value === undefined || value === null || value === "";
    return all.map((run) => [run, column.value(run)]).sort(([, a], [, b]) =>
      isMissing(a) - isMissing(b) || (isMissing(a) ? 0 : sign * (column.isNumber ? a - b : collator.compare(a, b))),
    ).map(([run]) => run);
  }

  // A column goes from its first direction to the other, and then back to the newest first.
  sortBy(column) {
    const [name, isDescending] = this.sort || [], first = Boolean(column.isNumber);
    this.sort = name !== column.name ? [column.name, first] : isDescending === first ? [name, !first] : null;
  }

  draw(all, chosen, listed) {
    const focused = document.activeElement && { ...document.activeElement.dataset };
    const columns = this.columns(chosen.map((name) => all.find((run) => run.name === name)).filter(Boolean), all);
    const head = document.createElement("tr");
    for (const column of columns) {
      const cell = make("th", undefined, column.isNumber ? "n" : ""), button = make("button", column.name);
      const isSorted = this.sort && this.sort[0] === column.name;
      cell.setAttribute("aria-sort", isSorted ? (this.sort[1] ? "descending" : "ascending") : "none");
      button.type = "button";
      button.dataset.column = column.name;
      button.addEventListener("click", () => { this.sortBy(column); this.draw(all, chosen, listed); });
      cell.append(button);
      head.append(cell);
    }
    const rows = this.sorted(all, columns).slice(0, listed).map((run) => this.row(run, chosen.indexOf(run.name), columns));
    this.table.replaceChildren(head, ...rows);
    if (!focused) return;
    for (const element of this.table.querySelectorAll("input, button")) {
      const { run, column } = element.dataset;
      if ((run && run === focused.run) || (column && column === focused.column)) element.focus();
    }
  }

  row(run, at, columns) {
    const row = document.createElement("tr");
    row.className = at < 0 ? "off" : "";
    for (const { name, isNumber, value, text } of columns) {
      const cell = make("td", undefined, isNumber ? "n" : "");
      if (name === "run") cell.append(this.box(run, at));
      else if (name === "state") cell.append(make("span", value(run), `state ${value(run)}`));
      else cell.textContent = text ? text(run) : value(run);
      row.append(cell);
    }
    return row;
  }

  box(run, at) {
    const box = document.createElement("input"), label = make("label", undefined, "run");
    box.type = "checkbox";
    box.checked = at >= 0;
    box.dataset.run = run.name;
    box.style.setProperty("--c", at >= 0 ? `var(--run-${at % 8})` : "");
    box.addEventListener("change", () => this.choose(run.name, box.checked));
    label.append(box, make("span", run.name));
    return label;
  }
}
