// The page: what is asked for, and who shows it.

import { count, hours, make, number, read, write } from "./ask.js";
import { Columns } from "./columns.js";
import { Detail } from "./detail.js";
import { Grid } from "./grid.js";

const $ = (id) => document.getElementById(id);
const EMPTY = { filter: "", search: "", show: "kept", marked: false, edited: false, ranges: {}, values: {}, sort: "", descending: false };

const state = {
  ...structuredClone(EMPTY),
  text() {
    const query = {};
    for (const key of Object.keys(EMPTY)) query[key] = this[key];
    return JSON.stringify(query);
  },
};
let about;
let columns;
let shown = { total: 0, hours: 0 };
let asking = 0;
let asked = "";

const grid = new Grid($("scroller"), $("space"), {
  open: (index) => detail.open(index),
  mark: (index) => mark(index),
  failed: complain,
});
const detail = new Detail(grid, { counted, mark, failed: complain });

async function start() {
  restore();
  about = await read("/api/manifest");
  document.title = `${about.name} · Kinema`;
  $("name").textContent = about.name;
  $("name").title = about.source;
  counted(about);
  const sort = $("sort");
  for (const [value, label] of [["", "manifest order"], ["?", "shuffled"]]) sort.append(new Option(label, value));
  for (const { name, kind } of about.columns) {
    if (kind !== "other") sort.append(new Option(name, name));
  }
  if (about.lost) complain({ message: `${about.lost} changes in ${about.edits_file} are of clips that this manifest has no more` });
  columns = new Columns($("sidebar"), about.columns, state, changed);
  show();
  await changed();
}

function counted({ marked, edited }) {
  $("marked-count").textContent = count(marked);
  $("edited-count").textContent = count(edited);
  $("export-marked").textContent = count(marked);
}

function complain(error) {
  const box = $("problem");
  box.hidden = !error;
  box.textContent = error ? [error.message, error.hint].filter(Boolean).join("\n→ ") : "";
}

// Inputs as the state has them.
function show() {
  $("search").value = state.search;
  $("filter").value = state.filter;
  $("only-marked").checked = state.marked;
  $("only-edited").checked = state.edited;
  $("sort").value = state.sort;
  $("direction").textContent = state.descending ? "↓" : "↑";
  document.querySelector(`input[name="show"][value="${state.show}"]`).checked = true;
  const chips = $("chips");
  chips.replaceChildren();
  const add = (label, remove) => {
    const chip = make("button", "chip", `${label} ✕`);
    chip.addEventListener("click", () => {
      remove();
      changed();
    });
    chips.append(chip);
  };
  for (const [name, [low, high]] of Object.entries(state.ranges)) {
    const label = low === null ? `${name} ≤ ${number(high)}` : high === null ? `${name} ≥ ${number(low)}` : `${number(low)} ≤ ${name} ≤ ${number(high)}`;
    add(label, () => delete state.ranges[name]);
  }
  for (const [name, values] of Object.entries(state.values)) {
    add(`${name}: ${values.map((v) => (v === null ? "(none)" : v || "(empty)")).join(", ")}`, () => delete state.values[name]);
  }
  if (chips.children.length > 1) {
    const all = make("button", "chip", "clear all");
    all.addEventListener("click", () => {
      state.ranges = {};
      state.values = {};
      changed();
    });
    chips.append(all);
  }
  chips.hidden = !chips.children.length;
}

async function changed() {
  show();
  remember();
  const mine = ++asking;
  const text = (asked = state.text());
  try {
    const found = await read("/api/query", { q: text });
    if (mine !== asking) return;
    shown = found;
    complain(null);
    $("filter").setAttribute("aria-invalid", "false");
  } catch (error) {
    if (mine !== asking) return;
    complain(error);
    $("filter").setAttribute("aria-invalid", String(Boolean(state.filter)));
    return;
  }
  const whole = shown.total === about.rows ? "" : ` of ${count(about.rows)}`;
  $("count").textContent = `${count(shown.total)}${whole} clips · ${hours(shown.hours)}`;
  $("count").title = `found in ${shown.ms.toFixed(1)} ms`;
  $("nothing").hidden = shown.total > 0;
  const column = ["", "?", "text", "path", "dropped_by"].includes(state.sort) ? "" : state.sort;
  grid.reset(text, shown.total, column);
  columns.refresh();
}

function remember() {
  const text = state.text();
  const plain = text === JSON.stringify(EMPTY);
  history.replaceState(null, "", plain ? location.pathname : `#${encodeURIComponent(text)}`);
}

function restore() {
  try {
    const kept = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");
    for (const key of Object.keys(EMPTY)) if (typeof kept[key] === typeof EMPTY[key]) state[key] = kept[key];
    if (!["kept", "dropped", "all"].includes(state.show)) state.show = "kept";
  } catch {
    // Somebody's own hash: begin with everything.
  }
}

// Whether it is marked now.
async function mark(index) {
  const value = await grid.value(index);
  if (!value) return false;
  try {
    const wanted = !value._marked;
    counted(await write("/api/marks", { rows: [value.row], marked: wanted }));
    grid.changed(index, { _marked: wanted });
    return wanted;
  } catch (error) {
    complain(error);
    return value._marked;
  }
}

// All that the filters leave; where they all are marked, none.
async function markAll() {
  if (!shown.total) return;
  const query = state.text();
  try {
    const { total } = await read("/api/query", { q: JSON.stringify({ ...JSON.parse(query), marked: true }) });
    const marked = total < shown.total;
    const what = marked ? "Mark" : "Take the marks off";
    if (!confirm(`${what} ${count(shown.total)} clips?`)) return;
    counted(await write("/api/marks", { marked, query }));
    grid.reset(query, shown.total, grid.shown, true);
  } catch (error) {
    complain(error);
  }
}

function later(act, ms) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...values), ms);
  };
}

const soon = later(() => changed(), 250);
$("search").addEventListener("input", (event) => {
  state.search = event.target.value;
  soon();
});
$("filter").addEventListener("input", (event) => {
  state.filter = event.target.value;
  typed();
});
const typed = later(() => changed(), 600);
$("filter").addEventListener("change", () => state.text() !== asked && changed());
document.querySelectorAll('input[name="show"]').forEach((input) => input.addEventListener("change", () => {
  state.show = input.value;
  changed();
}));
$("only-marked").addEventListener("change", (event) => {
  state.marked = event.target.checked;
  changed();
});
$("only-edited").addEventListener("change", (event) => {
  state.edited = event.target.checked;
  changed();
});
$("sort").addEventListener("change", (event) => {
  state.sort = event.target.value;
  changed();
});
$("direction").addEventListener("click", () => {
  state.descending = !state.descending;
  changed();
});
$("sidebar-button").addEventListener("click", () => {
  const open = $("sidebar").classList.toggle("open");
  $("sidebar-button").setAttribute("aria-expanded", open);
});
$("scroller").addEventListener("pointerdown", () => $("sidebar").classList.remove("open"));

// Light and dark: as the system has it until somebody chooses.
const theme = localStorage.getItem("kinema-theme");
if (theme) document.documentElement.dataset.theme = theme;
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("kinema-theme", dark ? "light" : "dark");
});

$("help-button").addEventListener("click", () => $("help").showModal());

$("export-button").addEventListener("click", () => {
  $("export-shown").textContent = count(shown.total);
  $("export-said").textContent = "";
  $("export-name").value ||= `${about.name.replace(/\.(csv|parquet)$/i, "")}.selected.parquet`;
  $("export").showModal();
});
const what = () => document.querySelector('input[name="what"]:checked').value;
const said = (text, bad) => {
  $("export-said").textContent = text;
  $("export-said").classList.toggle("bad", bad);
};
$("export-write").addEventListener("click", async () => {
  said("writing…", false);
  try {
    const done = await write("/api/export", {
      what: what(), name: $("export-name").value.trim(), replace: $("export-replace").checked, query: state.text(),
    });
    said(`${count(done.rows)} rows written to ${done.path}`, false);
  } catch (error) {
    said([error.message, error.hint].filter(Boolean).join("\n→ "), true);
  }
});
for (const ending of ["csv", "parquet"]) {
  $(`download-${ending}`).addEventListener("click", async () => {
    said("preparing…", false);
    try {
      // Fetched first, so that a refusal is a sentence here and no downloaded file.
      const wanted = new URLSearchParams({ what: what(), ending, q: state.text() });
      const link = make("a");
      const answer = await fetch(`/api/download?${wanted}`);
      if (!answer.ok) throw new Error((await answer.json()).what);
      link.href = URL.createObjectURL(await answer.blob());
      link.download = /filename="?([^";]+)/.exec(answer.headers.get("content-disposition") ?? "")?.[1] ?? `clips.${ending}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
      said("downloaded", false);
    } catch (error) {
      said(error.message, true);
    }
  });
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const field = event.target.closest("input, select, textarea");
  if (field) {
    if (event.key === "Escape") field.blur();
    return;
  }
  const here = grid.current;
  const acts = {
    ArrowLeft: () => grid.select(here - 1),
    ArrowRight: () => grid.select(here + 1),
    ArrowUp: () => grid.select(here < grid.columns ? here : here - grid.columns),
    ArrowDown: () => grid.select(here < 0 ? 0 : Math.min(grid.total - 1, here + grid.columns)),
    Home: () => grid.select(0),
    End: () => grid.select(grid.total - 1),
    " ": () => grid.toggle(here),
    Enter: () => here >= 0 && detail.open(here),
    m: () => here >= 0 && mark(here),
    M: () => markAll(),
    e: async () => {
      if (here < 0) return;
      await detail.open(here);
      $("caption").focus();
    },
    "/": () => $("search").focus(),
    f: () => $("filter").focus(),
    "?": () => $("help").showModal(),
  };
  if ((event.key === " " || event.key === "Enter") && event.target.closest("button, summary")) return;
  if (acts[event.key]) {
    event.preventDefault();
    acts[event.key]();
  }
});

start().catch(complain);
