// Elements from data. Everything that comes from a job is put down as text, never as markup.

/** An element with attributes and children; strings become text nodes, `null` children are left out. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

/**
 * Brings a container's children in line with `items`, in their order. An item that did not change keeps its element,
 * so that selections stay; one that did is drawn anew, with the focus where it was.
 */
export function reconcile(container, items, keyOf, draw, emptyText) {
  let refocus = null;
  const known = new Map([...container.children].map((child) => [child.dataset.key, child]));
  const wanted = items.map((item) => {
    const key = keyOf(item);
    const fingerprint = JSON.stringify(item);
    const there = known.get(key);
    if (there && there.fingerprint === fingerprint) return there;
    const made = draw(item);
    const focused = there ? [...there.querySelectorAll("button")].indexOf(document.activeElement) : -1;
    if (focused >= 0) refocus = made.querySelectorAll("button")[focused];
    made.dataset.key = key;
    made.fingerprint = fingerprint;
    return made;
  });
  if (wanted.length === 0) wanted.push(emptyRow(container, emptyText));
  wanted.forEach((element, index) => {
    if (container.children[index] !== element) container.insertBefore(element, container.children[index] ?? null);
  });
  while (container.children.length > wanted.length) container.lastElementChild.remove();
  refocus?.focus();
}

function emptyRow(container, text) {
  if (container.tagName !== "TBODY") return make("p", { class: "empty" }, text);
  const columns = container.parentElement.querySelectorAll("thead th").length;
  return make("tr", { class: "empty" }, make("td", { colspan: columns }, text));
}

/** A table's cell; `name` stands before it where the table is shown as cards. */
export function cell(name, content, attributes = {}) {
  return make("td", { ...attributes, "data-name": name }, content);
}

/** A time that says how long ago it was, and goes on doing so. */
export function ago(iso) {
  if (!iso) return "–";
  const element = make("time", { datetime: iso, title: new Date(iso).toLocaleString() });
  tick(element);
  return element;
}

/** Brings every time on the page up to date. */
export function tickAll() {
  document.querySelectorAll("time").forEach(tick);
}

function tick(element) {
  const seconds = Math.max(0, (Date.now() - Date.parse(element.dateTime)) / 1000);
  const text = seconds < 5 ? "now" : `${duration(seconds)} ago`;
  if (element.textContent !== text) element.textContent = text;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

/** Bytes in the unit that reads best; an unknown figure is a dash, never 0. */
export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let value = count;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

/** Milliseconds in the unit that reads best. */
export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1000) return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
  return value < 60_000 ? `${(value / 1000).toFixed(1)} s` : duration(value / 1000);
}

/** A state as a coloured pill. */
export function pill(state) {
  return make("span", { class: "pill", "data-state": state }, state);
}
