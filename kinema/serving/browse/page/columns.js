// The columns beside the grid: histograms to brush, values to choose.

import { count, make, number, read } from "./ask.js";

const LATE = new Set(["num_frames", "height", "width", "aspect_ratio", "fps", "resolution", "file_size"]);
const HIDDEN = new Set(["path", "text"]);
const FIRST = ["aesthetic", "match", "motion_mv", "flow", "sharpness", "ocr_area", "nsfw", "watermark", "duration"];
const CLOSED = /^(id|state|phash|frames|frames_count|text_short|ocr_text|(start|end)_(frame|s)|source.*|concept_rank|hash_distance|border_(top|bottom|left|right)|gop|lost_s|cut_by|whole|no_clips|clips)$/;
const FEW = 8;
const WIDTH = 246;
const HEIGHT = 58;

export class Columns {
  constructor(sidebar, columns, state, changed) {
    this.state = state;
    this.changed = changed;
    this.sections = [];
    this.generation = 0;
    const order = [...columns].filter((c) => !HIDDEN.has(c.name) && !c.name.startsWith("_"));
    order.sort((a, b) => rank(a) - rank(b));
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        entry.target.section.seen = entry.isIntersecting;
        this.load(entry.target.section);
      }
    }, { root: sidebar, rootMargin: "200px" });
    for (const column of order) {
      const section = make("details");
      const summary = make("summary");
      summary.append(make("span", "", column.name), make("span", "small"));
      const chart = make("div", "chart");
      section.append(summary, chart);
      section.open = !CLOSED.test(column.name);
      const item = { column, section, chart, note: summary.lastChild, generation: -1, seen: false };
      section.section = item;
      section.addEventListener("toggle", () => this.load(item));
      this.sections.push(item);
      sidebar.append(section);
      seen.observe(section);
    }
  }

  refresh() {
    this.generation++;
    for (const section of this.sections) this.load(section);
  }

  // One after the other, so that connections are left for pictures.
  load(item) {
    const { state } = this;
    item.note.textContent = state.ranges[item.column.name] || state.values[item.column.name] ? "●" : "";
    if (!item.seen || !item.section.open || item.generation === this.generation) return;
    if (item.brushed) return; // not under the pointer
    const generation = (item.generation = this.generation);
    this.chain = (this.chain ?? Promise.resolve()).then(async () => {
      if (generation !== this.generation) return;
      try {
        const found = await read("/api/histogram", { column: item.column.name, q: this.state.text() });
        if (generation === this.generation && !item.brushed) this.draw(item, found);
      } catch (error) {
        item.chart.textContent = error.message;
      }
    });
  }

  draw(item, found) {
    item.chart.replaceChildren();
    if (found.kind === "number") this.drawNumbers(item, found);
    else this.drawValues(item, found);
  }

  drawNumbers(item, found) {
    const name = item.column.name;
    if (!found.edges.length) {
      item.chart.append(make("p", "small", "no values"));
      return;
    }
    if (found.least === found.greatest && !this.state.ranges[name]) {
      const some = found.missing[0] ? ` · ${count(found.missing[0])} without a value` : "";
      item.chart.append(make("p", "small", `${number(found.least)} everywhere${some}`));
      return;
    }
    const bins = found.all.length;
    const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    svg.setAttribute("aria-label", `Histogram of ${name}, ${number(found.least)} to ${number(found.greatest)}`);
    const most = Math.max(...found.all, 1);
    const width = WIDTH / bins;
    // The root lets bins be seen that are a hundred times smaller than the largest.
    const height = (value) => (value ? Math.max(1.5, Math.sqrt(value / most) * (HEIGHT - 3)) : 0);
    const range = this.state.ranges[name];
    const inside = (k) => {
      const middle = (found.edges[k] + found.edges[k + 1]) / 2;
      return !range || ((range[0] === null || middle >= range[0]) && (range[1] === null || middle <= range[1]));
    };
    for (const [kind, values] of [["all", found.all], ["chosen", found.chosen]]) {
      values.forEach((value, k) => {
        const tall = height(value);
        if (!tall || (kind === "chosen" && !inside(k))) return;
        const bar = element("rect", { class: kind, x: k * width + 0.4, y: HEIGHT - tall, width: Math.max(0.6, width - 0.8), height: tall });
        if (kind === "all") {
          const label = element("title", {});
          label.textContent = `${number(found.edges[k])} … ${number(found.edges[k + 1])}: ${count(found.chosen[k])} of ${count(value)}`;
          bar.append(label);
        }
        svg.append(bar);
      });
    }
    const brush = element("rect", { class: "brush", y: 0, height: HEIGHT });
    svg.append(brush);
    const show = (from, to) => {
      brush.setAttribute("x", from);
      brush.setAttribute("width", Math.max(0, to - from));
    };
    const first = found.edges[0];
    const last = found.edges[bins];
    const x = (value) => ((value - first) / (last - first)) * WIDTH;
    if (range) show(range[0] === null ? 0 : x(range[0]), range[1] === null ? WIDTH : x(range[1]));
    this.brushing(item, svg, bins, show, (from, to) => {
      // The outer bins hold all that is beyond, so their sides are open.
      if (from === null) delete this.state.ranges[name];
      else {
        const low = from === 0 ? null : tidy(found.edges[from], found);
        const high = to === bins - 1 ? null : tidy(found.edges[to + 1], found);
        if (low === null && high === null) delete this.state.ranges[name];
        else this.state.ranges[name] = [low, high];
      }
      this.changed();
    });
    item.chart.append(svg, this.bounds(name, found));
    if (found.missing[0]) item.chart.append(make("p", "small", `${count(found.missing[0])} without a value`));
  }

  brushing(item, svg, bins, show, done) {
    let from = null;
    const bin = (event) => {
      const box = svg.getBoundingClientRect();
      return Math.max(0, Math.min(bins - 1, Math.floor(((event.clientX - box.left) / box.width) * bins)));
    };
    let start = 0;
    svg.addEventListener("pointerdown", (event) => {
      from = bin(event);
      start = event.clientX;
      item.brushed = true;
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      if (from === null) return;
      const to = bin(event);
      const width = WIDTH / bins;
      show(Math.min(from, to) * width, (Math.max(from, to) + 1) * width);
    });
    svg.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const to = bin(event);
      const moved = Math.abs(event.clientX - start) > 3;
      const [a, b] = [Math.min(from, to), Math.max(from, to)];
      from = null;
      item.brushed = false;
      done(moved ? a : null, moved ? b : null);
    });
    svg.addEventListener("pointercancel", () => {
      from = null;
      item.brushed = false;
      item.generation = -1;
      this.load(item);
    });
  }

  bounds(name, found) {
    const box = make("div", "bounds");
    [["least", 0], ["greatest", 1]].forEach(([which, k]) => {
      const input = make("input");
      input.type = "number";
      input.step = "any";
      input.placeholder = number(found[which]);
      input.setAttribute("aria-label", `${name}: ${which} value`);
      input.value = this.state.ranges[name]?.[k] ?? "";
      input.addEventListener("change", () => {
        const range = [...(this.state.ranges[name] ?? [null, null])];
        range[k] = input.value === "" ? null : Number(input.value);
        if (range[0] === null && range[1] === null) delete this.state.ranges[name];
        else this.state.ranges[name] = range;
        this.changed();
      });
      box.append(input);
    });
    return box;
  }

  drawValues(item, found) {
    const name = item.column.name;
    const list = make("div", "values");
    const most = Math.max(...found.values.map((v) => v[1]), 1);
    const chosen = new Set(this.state.values[name] ?? []);
    const add = ([value, all, shown]) => {
      const button = make("button");
      const bar = make("i");
      bar.style.width = `${(100 * all) / most}%`;
      const label = value === null ? "(none)" : value === "" ? "(empty)" : value;
      button.append(bar, make("span", "", label), make("span", "", shown === all ? count(all) : `${count(shown)} / ${count(all)}`));
      button.title = label;
      button.setAttribute("aria-pressed", chosen.has(value));
      button.addEventListener("click", () => {
        if (!chosen.delete(value)) chosen.add(value);
        if (chosen.size) this.state.values[name] = [...chosen];
        else delete this.state.values[name];
        this.changed();
      });
      list.append(button);
    };
    const few = found.values.length <= FEW + 2 ? found.values : found.values.slice(0, FEW);
    few.forEach(add);
    item.chart.append(list);
    if (few.length < found.values.length) {
      const rest = found.values.slice(FEW);
      const more = make("button", "quiet small", `${count(rest.length + found.others)} more values`);
      more.addEventListener("click", () => {
        more.remove();
        rest.forEach(add);
        if (found.others) list.append(make("p", "small", `and ${count(found.others)} more: use the filter`));
      });
      item.chart.append(more);
    }
    if (!found.values.length) item.chart.append(make("p", "small", "no values"));
  }
}

// A bound that a person would write: as few digits as the bins are wide.
function tidy(value, found) {
  const width = Math.abs(found.edges[1] - found.edges[0]);
  const digits = Math.max(0, Math.min(12, Math.ceil(-Math.log10(width)) + 2));
  return Number(value.toFixed(digits));
}

function rank(column) {
  if (column.name === "dropped_by") return 3;
  if (CLOSED.test(column.name)) return 4;
  if (LATE.has(column.name)) return 2;
  const place = FIRST.indexOf(column.name);
  if (place >= 0) return place / FIRST.length - 1;
  return column.kind === "number" ? 0 : 1;
}

function element(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
