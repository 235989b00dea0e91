"use strict";
// Which labels each client holds: a map of shares, the clients' sizes above it, and what is usual.

const BARS = 44, WRITTEN = 40;  // pixels of the highest bar; and of a cell that has its count written

class LabelMap extends CellMap {
  constructor() {
    super($("#labels canvas"), $("#label-cell"),
      "A column is a client, a row a label; the stronger its colour, the larger its share. Bars: the client's examples.");
  }

  // labels: {classes: [...], clients: [[client, [count, ...]], ...], of}
  draw(labels) {
    const { scheme } = document.documentElement.dataset;
    if (labels === this.labels && scheme === this.scheme) return;
    this.scheme = scheme;
    this.labels = labels;
    this.rows = labels.classes.length;
    this.columns = labels.clients.length;
    this.totals = labels.clients.map(([, counts]) => counts.reduce((sum, count) => sum + count, 0));
    this.sum();
    drawScale($("#label-scale"), `of a client's examples; the highest bar: ${number(Math.max(...this.totals))} examples`);
    this.paint();
  }

  // A table of what is usual among the clients.
  sum() {
    const { clients, classes } = this.labels;
    const usual = {
      examples: this.totals.slice(),
      [`labels, of ${classes.length}`]: clients.map(([, counts]) => counts.filter(Boolean).length),
      "largest label's share, %": clients.map(([, counts], k) => 100 * Math.max(...counts) / (this.totals[k] || 1)),
    };
    const head = document.createElement("tr");
    head.append(make("th", "a client's"), ...["least", "quartile", "median", "quartile", "most"].map((name) => make("th", name, "n")));
    const rows = Object.entries(usual).map(([name, values]) => {
      const row = document.createElement("tr"), five = quantiles(values.sort((a, b) => a - b));
      row.append(make("td", name), ...five.map((value) => make("td", number(Math.round(value)), "n")));
      return row;
    });
    $("#label-sums").replaceChildren(head, ...rows);
  }

  paint() {
    const { classes, clients } = this.labels, { totals } = this;
    const names = classes.map(String);
    const step = Math.max(1, Math.ceil(classes.length / 20));  // each how many rows have their names
    this.edge = { left: 12 + 7 * Math.max(...names.map((name) => name.length)), top: BARS + 8, bottom: 20 };
    const context = this.open(this.edge.top + this.edge.bottom + Math.max(28, Math.min(320, classes.length * 18)));
    if (!context) return;
    const { ratio, edge } = this, inside = this.width - edge.left;
    const across = Math.min(clients.length, Math.max(1, Math.round(inside * ratio)));
    const [red, green, blue] = pixel("--accent");
    const shades = Array.from({ length: 256 }, (_, alpha) => packed([red, green, blue, alpha]));
    const pixels = new Uint32Array(across * classes.length), strongest = new Float32Array(pixels.length);
    const highest = new Float64Array(across), most = Math.max(...totals, 1);
    clients.forEach(([, counts], k) => {
      const x = Math.floor(k * across / clients.length);
      highest[x] = Math.max(highest[x], totals[k]);
      counts.forEach((count, y) => {  // the eye tells little from nothing
        const at = y * across + x;
        strongest[at] = Math.max(strongest[at], Math.sqrt(count / (totals[k] || 1)));
        pixels[at] = shades[Math.round(255 * strongest[at])];
      });
    });
    this.put(context, pixels, across, classes.length);
    context.scale(ratio, ratio);
    context.fillStyle = colour("--soft");
    const wide = inside / across, high = (this.height - edge.top - edge.bottom) / classes.length;
    highest.forEach((total, x) => {
      const tall = BARS * total / most;
      context.fillRect(edge.left + x * wide, BARS - tall, wide >= 3 ? wide - 1 : wide, tall);
    });
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    names.forEach((name, y) => { if (y % step === 0) context.fillText(name, edge.left - 8, edge.top + (y + 0.5) * high); });
    context.textAlign = "center";
    const fits = clients.length / Math.max(1, Math.floor(inside / 60));
    const every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => step >= fits) || 1000;
    clients.forEach(([client], k) => {
      if (k % every === 0) context.fillText(client, edge.left + (k + 0.5) * inside / clients.length, this.height - 8);
    });
    if (wide >= WRITTEN && high >= 14) {
      clients.forEach(([, counts], x) => counts.forEach((count, y) => {
        context.fillStyle = colour(strongest[y * across + x] > 0.6 ? "--paper" : "--ink");
        if (count) context.fillText(number(count), edge.left + (x + 0.5) * wide, edge.top + (y + 0.5) * high);
      }));
    }
    this.canvas.setAttribute("aria-label", `Labels of ${clients.length} clients, one a column; ${classes.length} labels, one a row. Arrows go from cell to cell.`);
  }

  tell(row, column) {
    const [client, counts] = this.labels.clients[column], total = this.totals[column];
    return `client ${client}, ${number(total)} examples: ${number(counts[row])} of label ${this.labels.classes[row]}` +
      `, ${Math.round(100 * counts[row] / (total || 1))} %`;
  }
}
