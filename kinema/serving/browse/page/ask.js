// What the server is asked for, and how its answers are written for people.

export class Refused extends Error {
  constructor(problem) {
    super(problem.what ?? "the server refused");
    this.hint = problem.hint ?? "";
    this.reason = problem.reason ?? "";
  }
}

export async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({ what: "the server does not answer", hint: "is `kinema data browse` still running?" });
  }
  if (!answer.ok) throw new Refused(await problemOf(answer));
  return answer;
}

async function problemOf(answer) {
  try {
    const body = await answer.json();
    return body.what ? body : { what: `not accepted: ${JSON.stringify(body.detail ?? body)}` };
  } catch {
    return { what: `the server answered ${answer.status}` };
  }
}

export async function read(address, parameters = {}, signal = undefined) {
  const asked = new URLSearchParams(parameters);
  return (await ask(`${address}?${asked}`, { signal })).json();
}

export async function write(address, value) {
  const answer = await ask(address, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(value),
  });
  return answer.json();
}

const whole = new Intl.NumberFormat("en");

export const count = (value) => whole.format(value);

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return Math.abs(value) < 1e15 ? String(value) : value.toExponential(3);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  return String(Number(value.toFixed(size < 1 ? 4 : size < 100 ? 3 : 1)));
}

export function hours(value) {
  if (value >= 10) return `${count(Math.round(value))} h`;
  if (value >= 1) return `${value.toFixed(1)} h`;
  return value * 60 >= 1 ? `${(value * 60).toFixed(1)} min` : `${Math.round(value * 3600)} s`;
}

export function make(name, classes = "", text = null) {
  const element = document.createElement(name);
  if (classes) element.className = classes;
  if (text !== null) element.textContent = text; // never innerHTML: captions are other people's
  return element;
}
