// One clip, large: plays, all its columns, its caption to edit.

import { make, number, read, write } from "./ask.js";

const $ = (id) => document.getElementById(id);

export class Detail {
  constructor(grid, handlers) {
    this.grid = grid;
    this.handlers = handlers; // counted(state), mark(index), failed(error)
    this.dialog = $("detail");
    this.caption = $("caption");
    this.index = -1;
    $("close").addEventListener("click", () => this.close());
    $("previous").addEventListener("click", () => this.go(-1));
    $("next").addEventListener("click", () => this.go(1));
    $("save").addEventListener("click", () => this.save());
    $("revert").addEventListener("click", () => this.send(null));
    $("detail-mark").addEventListener("click", () => this.mark());
    this.caption.addEventListener("input", () => this.look());
    this.caption.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.save();
      if (event.key === "Escape") {
        event.preventDefault();
        this.caption.blur();
      }
    });
    this.dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      this.close();
    });
    // Not on the dialog: a button that becomes disabled gives the focus to nobody.
    document.addEventListener("keydown", (event) => this.dialog.open && this.key(event));
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.close();
    });
    addEventListener("beforeunload", (event) => {
      if (this.dirty) event.preventDefault();
    });
  }

  get dirty() {
    return this.dialog.open && this.row !== undefined && this.caption.value !== this.row.text;
  }

  async open(index) {
    const card = await this.grid.value(index);
    if (!card) return;
    let row;
    try {
      row = await read(`/api/row/${card.row}`);
    } catch (error) {
      this.handlers.failed(error);
      return;
    }
    this.index = index;
    this.number = card.row;
    this.row = row;
    this.show();
    if (!this.dialog.open) {
      this.dialog.showModal();
      $("next").focus();
    }
    this.grid.select(index);
  }

  show() {
    const { row } = this;
    const stage = this.dialog.querySelector(".stage");
    this.silence();
    const poster = `/media/${this.number}/poster`;
    const film = make(row.num_frames === 1 ? "img" : "video");
    if (film.tagName === "VIDEO") {
      Object.assign(film, { controls: true, loop: true, muted: true, autoplay: true, playsInline: true, poster });
      film.tabIndex = -1;
    }
    film.addEventListener("error", async () => {
      // The poster tells why: a file that is not there, or one that only this browser cannot play.
      let why = "this browser cannot play it";
      const answer = await fetch(poster).catch(() => null);
      if (answer && !answer.ok) why = (await answer.json().catch(() => ({}))).what ?? why;
      if (stage.contains(film)) stage.append(make("p", "why", why));
    });
    film.src = `/media/${this.number}/file`;
    stage.replaceChildren(film);
    $("detail-title").textContent = `Row ${this.number}`;
    const dropped = $("detail-dropped");
    dropped.hidden = !row.dropped_by;
    dropped.textContent = `✕ dropped: ${row.dropped_by}`;
    this.caption.value = row.text;
    $("saved").textContent = "";
    const body = $("all-columns").tBodies[0];
    body.replaceChildren();
    for (const [name, value] of Object.entries(row)) {
      if (name.startsWith("_") || name === "text" || (name === "dropped_by" && !value)) continue;
      const line = make("tr");
      const shown = value !== null && typeof value === "object" ? JSON.stringify(value) : number(value);
      line.append(make("td", "", name), make("td", "", shown));
      body.append(line);
    }
    this.look();
  }

  look() {
    const { row } = this;
    $("save").disabled = !this.dirty;
    $("revert").hidden = !row._edited;
    $("original").hidden = !row._edited;
    $("original").querySelector("p").textContent = row._original ?? "";
    const mark = $("detail-mark");
    mark.setAttribute("aria-pressed", row._marked);
    mark.textContent = row._marked ? "★ Marked" : "☆ Mark";
  }

  async save() {
    return this.dirty ? this.send(this.caption.value) : true;
  }

  // False where it could not be saved: then nothing may close the dialog.
  async send(text) {
    const { index, number: row } = this;
    try {
      this.handlers.counted(await write("/api/text", { row, text }));
      const fresh = await read(`/api/row/${row}`);
      this.grid.changed(index, { text: fresh.text, _edited: fresh._edited });
      if (this.number === row) {
        this.row = fresh;
        this.caption.value = fresh.text;
        $("saved").textContent = fresh._edited ? "saved" : "as in the manifest";
        this.look();
      }
      return true;
    } catch (error) {
      $("saved").textContent = `not saved: ${error.message}`;
      return false;
    }
  }

  async mark() {
    this.row._marked = await this.handlers.mark(this.index);
    this.look();
  }

  async go(by) {
    const index = this.index + by;
    if (index < 0 || index >= this.grid.total || !(await this.save())) return;
    await this.open(index);
  }

  async close() {
    if (!(await this.save())) return;
    this.silence();
    this.dialog.close();
    this.grid.scroller.focus({ preventScroll: true });
  }

  silence() {
    const film = this.dialog.querySelector(".stage video");
    film?.pause();
    film?.removeAttribute("src");
    film?.load();
    this.dialog.querySelector(".stage").replaceChildren();
  }

  key(event) {
    if (event.target === this.caption || event.ctrlKey || event.metaKey || event.altKey) return;
    const film = this.dialog.querySelector(".stage video");
    const acts = {
      ArrowLeft: () => this.go(-1),
      ArrowUp: () => this.go(-1),
      ArrowRight: () => this.go(1),
      ArrowDown: () => this.go(1),
      " ": () => (film?.paused ? film.play() : film?.pause()),
      m: () => this.mark(),
      e: () => this.caption.focus(),
    };
    if (event.key === " " && event.target.tagName === "BUTTON") return;
    if (acts[event.key]) {
      event.preventDefault();
      acts[event.key]();
    }
  }
}
