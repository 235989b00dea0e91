"use strict";
// A map of cells on a canvas, read cell by cell under the pointer or with the arrow keys.

const painted = new Map();  // by scheme and name, colours as a pixel's four bytes

function pixel(name) {
  const key = document.documentElement.dataset.scheme + name;
  if (!painted.has(key)) {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    context.fillStyle = colour(name);
    context.fillRect(0, 0, 1, 1);
    painted.set(key, context.getImageData(0, 0, 1, 1).data);
  }
  return painted.get(key);
}

function packed([red, green, blue, alpha]) {
  return new Uint32Array(new Uint8Array([red, green, blue, alpha]).buffer)[0];
}

// Swatches of shares, for a map whose colour is the stronger, the larger a share is; and a note beside them.
function drawScale(element, note) {
  element.replaceChildren(...[0, 5, 25, 50, 75, 100].map((share) => {
    const part = make("span", `${share} %`);
    part.style.setProperty("--c", `color-mix(in srgb, var(--accent) ${Math.round(100 * Math.sqrt(share / 100))}%, transparent)`);
    return part;
  }), make("b", note));
}

class CellMap {
  constructor(canvas, said, rest) {
    this.canvas = canvas;
    this.said = said;
    this.rest = rest;
    this.rows = this.columns = 0;
    this.edge = { left: 0, top: 0, bottom: 0 };  // pixels round the cells
    this.at = null;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") this.show(null);  // a finger that is lifted has read nothing yet
    });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => this.show(null));
    new ResizeObserver(() => this.rows && this.paint()).observe(canvas.parentElement);
    this.marker = make("div", undefined, "marker");
    this.marker.hidden = true;
    canvas.parentElement.append(this.marker);
  }

  // A context over a canvas as wide as there is room, or null where there is none.
  open(height, most = Infinity) {
    const width = Math.min(most, this.canvas.parentElement.clientWidth), ratio = window.devicePixelRatio || 1;
    if (!width) return null;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    this.ratio = ratio;
    this.width = width;
    this.height = height;
    return context;
  }

  // Draws pixels, one or more a cell, where the cells are.
  put(context, pixels, across, down) {
    const cells = document.createElement("canvas");
    cells.width = across;
    cells.height = down;
    cells.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), across, down), 0, 0);
    const { left, top, bottom } = this.edge, r = this.ratio;
    const w = this.canvas.width - left * r, h = this.canvas.height - (top + bottom) * r;
    context.drawImage(cells, left * r, top * r, w, h);
    context.fillStyle = colour("--paper");  // gaps between cells that are large enough for them
    const wide = w / this.columns, high = h / this.rows;
    if (wide >= 6 * r) for (let k = 1; k < this.columns; k++) context.fillRect(Math.round(left * r + k * wide), top * r, r, h);
    if (high >= 6 * r) for (let k = 1; k < this.rows; k++) context.fillRect(left * r, Math.round(top * r + k * high), w, r);
    this.show(this.at);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect(), { left, top, bottom } = this.edge;
    this.show([
      Math.floor((event.clientY - box.top - top) / (box.height - top - bottom) * this.rows),
      Math.floor((event.clientX - box.left - left) / (box.width - left) * this.columns),
    ]);
  }

  key(event) {
    if (event.key === "Escape") this.show(null);
    const [row, column] = this.at || [0, this.columns - 1];
    const to = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, this.columns - 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.show(this.at ? to : [row, column]);
  }

  show(at) {
    this.marker.hidden = !at;
    this.at = at;
    if (!at) {
      this.said.textContent = this.rest;
      return;
    }
    const clip = (value, most) => Math.min(most - 1, Math.max(0, value));
    const row = clip(at[0], this.rows), column = clip(at[1], this.columns);
    this.at = [row, column];
    this.said.textContent = this.tell(row, column);
    const { left, top, bottom } = this.edge;
    const wide = (this.width - left) / this.columns, high = (this.height - top - bottom) / this.rows;
    const style = this.marker.style;
    style.left = `${left + column * wide}px`;
    style.top = `${top + row * high}px`;
    style.width = `${Math.max(wide, 3)}px`;
    style.height = `${Math.max(high, 3)}px`;
  }
}
