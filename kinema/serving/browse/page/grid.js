// The grid: only cards that can be seen are in the document, whatever the number of clips.

import { ask, make, number, read } from "./ask.js";

const BLOCK = 60; // cards of one request
const GAP = 14;
const LEAST = 250; // pixels of a card's width
const TEXT = 102; // pixels below the picture
const TALLEST = 8e6; // pixels that browsers scroll exactly
const AT_ONCE = 4; // pictures; browsers open six connections to one host

export class Grid {
  constructor(scroller, space, handlers) {
    this.scroller = scroller;
    this.space = space;
    this.handlers = handlers; // open(index), mark(index), failed(error)
    this.total = 0;
    this.current = -1;
    this.blocks = new Map();
    this.cards = new Map();
    this.pictures = new Pictures();
    this.query = "{}";
    this.shown = "";
    scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    scroller.addEventListener("wheel", (event) => this.turn(event), { passive: false });
    new ResizeObserver(() => this.measure()).observe(scroller);
  }

  // Another selection: from its beginning, unless it is the same one again.
  reset(query, total, shownColumn, keep = false) {
    this.query = query;
    this.total = total;
    this.shown = shownColumn;
    this.blocks.clear();
    for (const index of [...this.cards.keys()]) this.drop(index);
    if (!keep) {
      this.current = -1;
      this.scroller.scrollTop = 0;
    }
    this.measure();
  }

  measure() {
    const width = this.scroller.clientWidth - GAP;
    this.columns = Math.max(1, Math.floor(width / (LEAST + GAP)));
    this.width = Math.floor(width / this.columns) - GAP;
    this.height = Math.round((this.width * 9) / 16) + TEXT;
    this.step = this.height + GAP;
    this.virtual = Math.ceil(this.total / this.columns) * this.step + GAP;
    this.real = Math.min(this.virtual, TALLEST);
    this.space.style.height = `${this.real}px`;
    for (const [index, card] of this.cards) this.place(index, card);
    this.draw();
  }

  // Beyond TALLEST, the bar stands for more pixels than it has.
  get scale() {
    const view = this.scroller.clientHeight;
    return this.real > view ? Math.max(1, (this.virtual - view) / (this.real - view)) : 1;
  }

  get top() {
    return this.scroller.scrollTop * this.scale;
  }

  turn(event) {
    if (this.scale === 1 || event.ctrlKey) return;
    event.preventDefault();
    this.scroller.scrollTop += Math.sign(event.deltaY) * Math.max(1, Math.abs(event.deltaY) / this.scale);
  }

  place(index, card) {
    const x = GAP + (index % this.columns) * (this.width + GAP);
    const y = GAP + Math.floor(index / this.columns) * this.step;
    const shift = this.scale === 1 ? y : this.scroller.scrollTop + y - this.top;
    card.style.transform = `translate(${x}px, ${Math.round(shift)}px)`;
    card.style.width = `${this.width}px`;
    card.style.height = `${this.height}px`;
  }

  draw() {
    const first = Math.max(0, Math.floor(this.top / this.step) - 1) * this.columns;
    const rows = Math.ceil(this.scroller.clientHeight / this.step) + 3;
    const last = Math.min(this.total, first + rows * this.columns);
    for (const index of [...this.cards.keys()]) if (index < first || index >= last) this.drop(index);
    for (let index = first; index < last; index++) {
      const value = this.known(index);
      if (value && !this.cards.has(index)) this.add(index, value);
    }
    if (this.scale > 1) for (const [index, card] of this.cards) this.place(index, card);
    // Who drags the bar passes thousands of clips: only where it rests, they are asked for.
    clearTimeout(this.resting);
    this.resting = setTimeout(() => {
      for (let block = Math.floor(first / BLOCK); block * BLOCK < last; block++) this.fetch(block);
    }, 40);
  }

  known(index) {
    const block = this.blocks.get(Math.floor(index / BLOCK));
    return Array.isArray(block) ? block[index % BLOCK] : undefined;
  }

  async value(index) {
    await this.fetch(Math.floor(index / BLOCK));
    return this.known(index);
  }

  fetch(block) {
    const had = this.blocks.get(block);
    if (had) return Array.isArray(had) ? Promise.resolve() : had;
    const blocks = this.blocks;
    const query = this.query;
    const loading = read("/api/rows", {
      q: query, start: block * BLOCK, count: BLOCK, columns: JSON.stringify(this.shown ? [this.shown] : []),
    }).then(({ cards }) => {
      if (query !== this.query || blocks.get(block) !== loading) return;
      blocks.set(block, cards);
      this.draw();
    }, (error) => {
      blocks.delete(block);
      this.handlers.failed(error);
    });
    blocks.set(block, loading);
    return loading;
  }

  add(index, value) {
    const card = make("article", "card");
    card.dataset.index = index;
    card.dataset.row = value.row;
    const film = make("div", "film");
    const star = make("button", "star", "★");
    star.title = "Mark (m)";
    star.tabIndex = -1;
    star.addEventListener("click", (event) => {
      event.stopPropagation();
      this.select(index);
      this.handlers.mark(index);
    });
    film.append(make("span", "badge", badge(value)), star);
    card.append(film, make("p", "words"), make("div", "notes"));
    card.addEventListener("click", () => {
      this.select(index);
      this.handlers.open(index);
    });
    // A pointer that only passes starts nothing.
    card.addEventListener("pointerenter", (event) => {
      if (event.pointerType === "mouse") card.waiting = setTimeout(() => this.play(index), 70);
    });
    card.addEventListener("pointerleave", () => {
      clearTimeout(card.waiting);
      if (!card.pinned) this.stop(index);
    });
    this.cards.set(index, card);
    this.fill(index, value);
    this.place(index, card);
    this.space.append(card);
    this.pictures.want(card, value.row, (problem) => {
      card.broken = true;
      film.append(make("div", "why", problem));
    });
  }

  // What may change while a card is seen.
  fill(index, value) {
    const card = this.cards.get(index);
    if (!card) return;
    card.classList.toggle("marked", value._marked);
    card.classList.toggle("out", Boolean(value.dropped_by));
    card.classList.toggle("current", index === this.current);
    const words = card.querySelector(".words");
    words.classList.toggle("none", !value.text.trim());
    words.textContent = value.text.trim() || "no caption";
    words.title = value.text;
    const notes = card.querySelector(".notes");
    notes.replaceChildren();
    if (this.shown) notes.append(make("span", "", `${this.shown} ${number(value[this.shown])}`));
    if (value._edited) notes.append(make("span", "edited", "✎ edited"));
    if (value.dropped_by) {
      const why = make("span", "dropped", `✕ ${value.dropped_by}`);
      why.title = value.dropped_by;
      notes.append(why);
    } else {
      const name = make("span", "name", value.path.split("/").pop());
      name.title = value.path;
      notes.append(name);
    }
  }

  drop(index) {
    const card = this.cards.get(index);
    this.stop(index);
    clearTimeout(card.waiting);
    this.pictures.forget(card);
    card.remove();
    this.cards.delete(index);
  }

  play(index) {
    const card = this.cards.get(index);
    const value = this.known(index);
    if (!card || !value || card.broken || card.querySelector("video") || value.num_frames < 2) return;
    const video = make("video");
    video.muted = true;
    video.loop = true;
    video.playsInline = true;
    video.src = `/media/${value.row}/file`;
    video.addEventListener("error", () => {
      video.remove();
      if (!card.querySelector(".why")) {
        const badge = make("span", "badge number", "this browser cannot play it");
        card.querySelector(".film").append(badge);
      }
    });
    card.querySelector(".film .badge").before(video);
    video.play().catch(() => {});
  }

  stop(index) {
    const card = this.cards.get(index);
    const video = card?.querySelector("video");
    if (video) {
      video.pause();
      video.removeAttribute("src");
      video.load(); // ends the request
      video.remove();
    }
    if (card) card.pinned = false;
  }

  toggle(index) {
    const card = this.cards.get(index);
    const video = card?.querySelector("video");
    if (!video) {
      this.play(index);
      if (card) card.pinned = true;
    } else if (video.paused) video.play().catch(() => {});
    else video.pause();
  }

  select(index) {
    if (!this.total) return;
    const before = this.current;
    this.current = Math.max(0, Math.min(this.total - 1, index));
    if (before !== this.current && before >= 0) {
      this.cards.get(before)?.classList.remove("current");
      this.stop(before);
    }
    this.cards.get(this.current)?.classList.add("current");
    const y = Math.floor(this.current / this.columns) * this.step;
    const view = this.scroller.clientHeight;
    if (y < this.top) this.scroller.scrollTop = y / this.scale;
    else if (y + this.step + GAP > this.top + view) {
      this.scroller.scrollTop = Math.ceil((y + this.step + GAP - view) / this.scale);
    }
  }

  changed(index, change) {
    const value = this.known(index);
    if (!value) return;
    Object.assign(value, change);
    this.fill(index, value);
  }
}

function badge(value) {
  const size = value.width && value.height ? `${value.width}×${value.height}` : "";
  if (value.num_frames === 1) return `image · ${size}`;
  const seconds = value.fps ? `${(value.num_frames / value.fps).toFixed(1)} s · ` : "";
  return seconds + size;
}

// Pictures of cards: the last one wanted comes first, and who has left wants none.
class Pictures {
  constructor() {
    this.waiting = [];
    this.running = 0;
  }

  want(card, row, failed) {
    this.waiting.push({ card, row, failed });
    this.next();
  }

  forget(card) {
    this.waiting = this.waiting.filter((item) => item.card !== card);
    card.abort?.abort();
    if (card.address) URL.revokeObjectURL(card.address);
  }

  async next() {
    if (this.running >= AT_ONCE || !this.waiting.length) return;
    const { card, row, failed } = this.waiting.pop();
    this.running++;
    card.abort = new AbortController();
    try {
      const answer = await ask(`/media/${row}/poster`, { signal: card.abort.signal });
      const picture = await answer.blob();
      if (!card.abort.signal.aborted) {
        card.address = URL.createObjectURL(picture);
        const image = make("img");
        image.alt = "";
        image.src = card.address;
        card.querySelector(".film").prepend(image);
      }
    } catch (error) {
      if (error.name !== "AbortError") failed(error.message);
    } finally {
      this.running--;
      this.next();
    }
  }
}
