// How each noun looks: one function for each row or card, from the API's own objects.

import { ago, bytes, cell, make, milliseconds, pill } from "/static/dom.js";

export const OPEN = ["scheduled", "queued", "reserved", "running", "retrying"];
export const STATES = [...OPEN, "succeeded", "failed", "cancelled", "expired"];
export const KINDS = [
  "memory.allocate", "memory.deallocate", "memory.copy", "memory.clear", "memory.write", "memory.read",
  "inference.load_model", "inference.run", "inference.unload_model", "inference.close_session",
  "training.initialize", "training.step", "training.checkpoint", "training.validate", "training.end_session",
];

/** How far back a device's history is shown. */
export const HISTORY_MS = 600_000;

/** A device, with its memory by what holds it, and its recent history. */
export function deviceCard(device, act) {
  const draining = device.state === "draining";
  return make(
    "article",
    { class: "card", "aria-label": device.device_id },
    make(
      "div",
      { class: "card-head" },
      make("h3", {}, device.device_id),
      pill(device.state),
      make(
        "button",
        {
          type: "button",
          class: "quiet",
          disabled: device.state === "offline",
          title: draining ? "Take new jobs again" : "Take no new jobs; what runs is finished",
          onclick: () => act(draining ? "resume" : "drain", device),
        },
        draining ? "Resume" : "Drain",
      ),
    ),
    make("p", { class: "subtle" }, [device.name, device.backend, device.node].filter(Boolean).join(" · ")),
    memoryBar(device),
    make(
      "dl",
      { class: "figures" },
      figure("running", device.running),
      figure("queued", device.queued),
      figure("free", bytes(device.free_bytes)),
      figure("of", bytes(device.total_bytes)),
      figure("seen", ago(device.heartbeat_at)),
    ),
    history(device.samples ?? []),
  );
}

function figure(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value));
}

function memoryBar(device) {
  const memory = device.memory;
  const whole = memory?.budget_bytes ?? device.total_bytes;
  if (!memory || !whole) return make("p", { class: "subtle" }, "memory not known");
  const parts = [
    ["models", memory.models_bytes],
    ["training", memory.training_bytes],
    ["allocations", memory.allocated_bytes ?? memory.used_bytes - memory.models_bytes - memory.training_bytes],
  ].filter(([, size]) => size > 0);
  const bar = make("div", {
    class: "memory",
    role: "img",
    "aria-label": `${bytes(memory.reserved_bytes)} of ${bytes(whole)} reserved`,
  });
  for (const [name, size] of parts) {
    const part = make("span", { class: `part ${name}`, title: `${name}: ${bytes(size)}` });
    part.style.width = `${Math.min(100, (100 * size) / whole)}%`;
    bar.append(part);
  }
  const legend = parts.map(([name, size]) => make("li", { class: name }, `${name} ${bytes(size)}`));
  if (!legend.length) legend.push(make("li", {}, "nothing reserved"));
  legend.push(make("li", { class: "budget" }, `budget ${bytes(whole)}`));
  return make("div", {}, bar, make("ul", { class: "legend" }, legend));
}

function history(samples) {
  if (samples.length < 2) return null;
  const width = 300;
  const height = 32;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "history");
  svg.setAttribute("role", "img");
  const last = samples[samples.length - 1];
  svg.setAttribute("aria-label", `busy ${Math.round(100 * (last.busy_share ?? 0))} % of the time`);
  const now = Date.parse(last.time);
  const points = samples.map((sample) => {
    const x = (1 - (now - Date.parse(sample.time)) / HISTORY_MS) * width;
    return `${x.toFixed(1)},${(height - 1 - Math.min(1, sample.busy_share ?? 0) * (height - 2)).toFixed(1)}`;
  });
  const area = document.createElementNS("http://www.w3.org/2000/svg", "polygon");
  const from = points[0].split(",")[0];
  area.setAttribute("points", `${from},${height} ${points.join(" ")} ${width},${height}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.join(" "));
  svg.append(area, line);
  return make("div", { class: "history-box" }, svg, make("span", { class: "subtle" }, "busy, last 10 min"));
}

/** A job's row. */
export function jobRow(job, act) {
  const open = OPEN.includes(job.state);
  return make(
    "tr",
    {},
    cell("State", [pill(job.state), progress(job)]),
    cell("Kind", job.kind),
    cell("Job", make("button", { type: "button", class: "link", title: job.job_id, onclick: () => act("show", job) }, shortId(job.job_id))),
    cell("Device", job.device_id ?? "any"),
    cell("Priority", job.priority, { class: "number minor" }),
    cell("Submitted", ago(job.submitted_at)),
    cell("Waited", milliseconds(job.timings.queued_ms), { class: "number minor" }),
    cell("On device", milliseconds(job.timings.device_ms), { class: "number" }),
    cell("Labels", labels(job), { class: "labels" }),
    cell("", open ? make("button", { type: "button", class: "danger", onclick: () => act("cancel", job) }, "Cancel") : null, { class: "actions" }),
  );
}

function labels(job) {
  const said = Object.entries(job.labels).map(([name, value]) => make("span", { class: "label" }, `${name}: ${value}`));
  if (job.error) said.unshift(make("span", { class: "error", title: job.error.message }, job.error.code));
  return said;
}

/** How far a job is: from any pair of figures that its progress tells (`done_…` and `total_…`, `step` and `steps`). */
function progress(job) {
  const told = job.progress;
  if (!told || !OPEN.includes(job.state)) return null;
  const share = told.share ?? told.fraction ?? ratio(told, "done_bytes", "total_bytes") ?? ratio(told, "done", "total")
    ?? ratio(told, "step", "steps") ?? ratio(told, "step", "total_steps");
  return share === undefined ? null : make("progress", { max: 1, value: share, "aria-label": "progress" });
}

function ratio(told, done, total) {
  return typeof told[done] === "number" && told[total] > 0 ? told[done] / told[total] : undefined;
}

/** A model's row. */
export function modelRow(model, act) {
  const there = model.state === "loaded";
  return make(
    "tr",
    {},
    cell("State", pill(model.state)),
    cell("Model", [
      make("button", { type: "button", class: "link", title: model.model_id, onclick: () => act("show", model) }, `${model.name}:${model.version}`),
      model.pinned ? make("span", { class: "label" }, "pinned") : null,
    ]),
    cell("Device", model.device_id),
    cell("Memory", bytes(model.memory_bytes), { class: "number" }),
    cell("Runs", model.failed_count ? `${model.run_count} (${model.failed_count} failed)` : model.run_count, { class: "number" }),
    cell("Last used", ago(model.last_used_at)),
    cell("", there ? make("button", { type: "button", class: "danger", onclick: () => act("unload", model) }, "Unload") : null, { class: "actions" }),
  );
}

/** A session's row, of inference or training, as `dashboard.js` brings both to one form. */
export function sessionRow(session, act) {
  return make(
    "tr",
    {},
    cell("State", pill(session.state)),
    cell("Session", make("button", { type: "button", class: "link", title: session.id, onclick: () => act("show", session.whole) }, shortId(session.id))),
    cell("Of", session.of),
    cell("Device", session.device_id ?? "–"),
    cell("Done", session.done, { class: "number" }),
    cell("Last used", ago(session.last_used_at)),
  );
}

/** The end of an id: UUIDv7s of one moment begin alike. */
function shortId(id) {
  return id.length > 12 ? `…${id.slice(-8)}` : id;
}
