"use strict";
// Confusion matrix of a run's last round: a map of cells, and the accuracy of each class.

class ConfusionMap extends CellMap {
  constructor() {
    super($("#confusion canvas"), $("#confusion-cell"), "A row is a label, a column a prediction.");
    drawScale($("#confusion-scale"), "of a label's examples");
  }

  draw(rows) {
    this.matrix = rows;
    this.rows = this.columns = rows.length;
    this.totals = rows.map((row) => row.reduce((total, count) => total + count, 0));
    this.paint();
    const all = this.totals.reduce((total, count) => total + count, 0);
    const head = document.createElement("tr");
    head.append(...["label", "examples", "accuracy"].map((name) => make("th", name, "n")));
    $("#confusion-classes").replaceChildren(head, ...rows.map((row, k) => {
      const line = document.createElement("tr");
      line.append(...[String(k), number(this.totals[k]), this.accuracy(k)].map((text) => make("td", text, "n")));
      return line;
    }));
    const right = rows.reduce((total, row, k) => total + row[k], 0);
    return all ? `accuracy ${number(right / all)} on ${number(all)} examples` : "no examples";
  }

  accuracy(label) {
    return this.totals[label] ? number(this.matrix[label][label] / this.totals[label]) : "–";
  }

  paint() {
    const size = this.rows, step = Math.ceil(size / 20);
    const room = this.canvas.parentElement.clientWidth;
    const side = Math.min(32 * Math.max(size, 4), 480, room - 40);
    this.edge = { left: 34, top: 4, bottom: 20 };
    this.canvas.style.maxWidth = `${side + this.edge.left}px`;
    const context = this.open(side + 24, side + this.edge.left);
    if (!context) return;
    const [red, green, blue] = pixel("--accent"), pixels = new Uint32Array(size * size);
    const share = (row, column) => Math.sqrt(this.matrix[row][column] / (this.totals[row] || 1));
    for (let k = 0; k < pixels.length; k++) {
      pixels[k] = packed([red, green, blue, Math.round(255 * share(Math.floor(k / size), k % size))]);
    }
    this.put(context, pixels, size, size);
    context.scale(this.ratio, this.ratio);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    const cell = side / size, { left, top } = this.edge;
    for (let k = 0; k < size; k++) {
      const middle = (k + 0.5) * cell;
      context.fillStyle = colour("--soft");
      if (k % step === 0) {
        context.textAlign = "right";
        context.fillText(k, left - 6, top + middle);
        context.textAlign = "center";
        context.fillText(k, left + middle, top + side + 12);
      }
      context.textAlign = "center";
      for (let column = 0; column < size; column++) {
        const text = number(this.matrix[k][column]);
        if (text === "0" || context.measureText(text).width > cell - 4) continue;
        context.fillStyle = colour(share(k, column) > 0.6 ? "--paper" : "--ink");
        context.fillText(text, left + (column + 0.5) * cell, top + middle);
      }
    }
    this.canvas.setAttribute("aria-label", `Confusion matrix of ${size} classes: labels by predictions. Arrows go from cell to cell.`);
  }

  tell(row, column) {
    const count = this.matrix[row][column], total = this.totals[row];
    return `label ${row} predicted as ${column}: ${number(count)} of ${number(total)}, ${Math.round(100 * count / (total || 1))} %`;
  }
}
