// The dashboard: asks the API again and again while the page is seen, and shows what it says.

import { Refused, ask, key } from "/static/api.js";
import { make, reconcile, tickAll } from "/static/dom.js";
import { gallery, imagesOf } from "/static/images.js";
import { HISTORY_MS, KINDS, STATES, deviceCard, jobRow, modelRow, sessionRow } from "/static/views.js";

const POLL_MS = 2000;
const SAMPLES_MS = 10_000;
const PAGE = 50;

const $ = (id) => document.getElementById(id);
const filters = $("filters");
const shown = { jobs: PAGE, samples: {}, samplesAt: 0, devices: "" };
let timer = 0;
let round = 0;
let pressed = false;

start();

function start() {
  for (const state of STATES) filters.elements.state.append(make("option", {}, state));
  for (const kind of KINDS) filters.elements.kind.append(make("option", {}, kind));
  $("key").value = key.get();
  $("key-form").addEventListener("submit", useKey);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("change", afresh);
  $("more").addEventListener("click", () => {
    shown.jobs += PAGE;
    poll();
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));
  // What is being clicked is not replaced under the pointer.
  document.addEventListener("pointerdown", () => (pressed = true));
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => (pressed = false));
  setInterval(tickAll, 1000);
  poll();
}

function useKey(event) {
  event.preventDefault();
  key.set($("key").value.trim());
  shown.samplesAt = 0;
  poll();
}

function afresh() {
  shown.jobs = PAGE;
  poll();
}

async function poll() {
  clearTimeout(timer);
  const mine = ++round;
  try {
    const [ready, devices, memory, models, inference, jobs] = await Promise.all([
      ask("/readyz", { accepts: [503] }),
      ask("/api/devices"),
      ask("/api/memory/status"),
      ask("/api/inference/models", { query: { limit: 100 } }),
      ask("/api/inference/sessions", { query: { limit: 50 } }),
      readJobs(),
    ]);
    const [training] = await Promise.all([readTraining(memory.devices), readSamples(devices.devices)]);
    if (mine !== round) return;
    while (pressed) await new Promise((resolve) => setTimeout(resolve, 50));
    showHealth(ready);
    showDevices(devices.devices, memory.devices);
    showJobs(jobs);
    showModels(models.models);
    showSessions(inference.sessions, training);
    notice("");
  } catch (error) {
    if (mine !== round) return;
    tellFailure(error);
    // A wrong key does not get better by itself.
    if (error.status === 401) return;
  }
  if (!document.hidden) timer = setTimeout(poll, POLL_MS);
}

async function readJobs() {
  const query = Object.fromEntries(new FormData(filters));
  const found = { jobs: [], next_cursor: null };
  do {
    const left = Math.min(1000, shown.jobs - found.jobs.length);
    const page = await ask("/api/jobs", { query: { ...query, limit: left, cursor: found.next_cursor } });
    found.jobs.push(...page.jobs);
    found.next_cursor = page.next_cursor;
  } while (found.next_cursor && found.jobs.length < shown.jobs);
  return found;
}

/** The training sessions that lie on devices, each as it stands. */
async function readTraining(memory) {
  const busy = memory.filter((device) => device.training_bytes > 0);
  const maps = await Promise.all(
    busy.map((device) => ask(`/api/memory/device/${encodeURIComponent(device.device_id)}`, { query: { map: true } })),
  );
  const ids = maps.flatMap((device) => device.map).filter((thing) => thing.type === "training_session" && thing.id);
  const told = ids.slice(0, 20).map((thing) => ask(`/api/training/status/${encodeURIComponent(thing.id)}`, { accepts: [404] }));
  return (await Promise.all(told)).filter((session) => session.session_id);
}

async function readSamples(devices) {
  if (Date.now() - shown.samplesAt < SAMPLES_MS) return;
  shown.samplesAt = Date.now();
  const since = new Date(Date.now() - HISTORY_MS).toISOString();
  const ids = devices.map((device) => device.device_id);
  const told = await Promise.all(ids.map((id) => ask(`/api/devices/${encodeURIComponent(id)}/samples`, { query: { since } })));
  shown.samples = Object.fromEntries(ids.map((id, index) => [id, told[index].samples]));
}

function showHealth(ready) {
  const bad = ["postgresql", "redis", "devices"].filter((part) => ready[part] && !ready[part].ok);
  $("health").textContent = bad.length ? `not ready: ${bad.join(", ")}` : "ready";
  $("health").dataset.state = bad.length ? "bad" : "good";
}

function showDevices(devices, memory) {
  const standing = new Map(memory.map((entry) => [entry.device_id, entry]));
  const all = devices.map((device) => ({
    ...device,
    memory: standing.get(device.device_id) ?? null,
    samples: shown.samples[device.device_id] ?? [],
  }));
  $("devices-count").textContent = devices.length || "";
  reconcile($("devices"), all, (device) => device.device_id, (device) => deviceCard(device, act), "No device has registered: start a worker.");
  const ids = devices.map((device) => device.device_id).join();
  if (ids === shown.devices) return;
  shown.devices = ids;
  const select = filters.elements.device_id;
  const chosen = select.value;
  select.replaceChildren(make("option", { value: "" }, "all"), ...devices.map((device) => make("option", {}, device.device_id)));
  select.value = chosen;
}

function showJobs(found) {
  reconcile($("jobs").tBodies[0], found.jobs, (job) => job.job_id, (job) => jobRow(job, act), "No jobs.");
  $("more").hidden = !found.next_cursor;
}

function showModels(models) {
  const there = models.filter((model) => ["loading", "loaded"].includes(model.state));
  const gone = models.filter((model) => !there.includes(model)).slice(0, 10);
  $("models-count").textContent = there.length || "";
  reconcile($("models").tBodies[0], [...there, ...gone], (model) => model.model_id, (model) => modelRow(model, act), "No models.");
}

function showSessions(inference, training) {
  const all = [
    ...training.map((session) => ({
      id: session.session_id,
      state: session.state,
      of: "training",
      device_id: session.device_id,
      done: `${session.step ?? 0} steps`,
      last_used_at: session.last_used_at ?? null,
      whole: session,
    })),
    ...inference.map((session) => ({
      id: session.session_id,
      state: session.state,
      of: "inference",
      device_id: session.device_id,
      done: `${session.runs.succeeded} runs`,
      last_used_at: session.last_used_at,
      whole: session,
    })),
  ];
  const over = ["closed", "expired", "lost", "ended", "failed"];
  const open = all.filter((session) => !over.includes(session.state));
  $("sessions-count").textContent = open.length || "";
  const ended = all.filter((session) => over.includes(session.state)).slice(0, 10);
  reconcile($("sessions").tBodies[0], [...open, ...ended], (session) => session.id, (session) => sessionRow(session, act), "No sessions.");
}

async function act(what, thing) {
  try {
    if (what === "show") return showDetails(thing);
    if (what === "cancel") await ask(`/api/jobs/${encodeURIComponent(thing.job_id)}`, { method: "DELETE" });
    if (what === "again") {
      const path = `/api/jobs/${encodeURIComponent(thing.job_id)}/retry`;
      const made = await ask(path, { method: "POST", json: { seed: null } });
      $("details").close();
      return showDetails(made);
    }
    if (what === "drain" || what === "resume") {
      await ask(`/api/devices/${encodeURIComponent(thing.device_id)}/${what}`, { method: "POST" });
    }
    if (what === "unload") {
      if (!confirm(`Unload ${thing.name}:${thing.version} from ${thing.device_id} once its runs are done?`)) return;
      await ask(`/api/inference/unload-model/${encodeURIComponent(thing.model_id)}`, { method: "DELETE" });
    }
    await poll();
  } catch (error) {
    tellFailure(error);
  }
}

async function showDetails(thing) {
  const path = `/api/jobs/${encodeURIComponent(thing.job_id)}`;
  let whole = thing.job_id ? await ask(path) : thing;
  // The settings that made an image are in its request.
  if (whole.job_id && imagesOf(whole).length) whole = await ask(path, { query: { include: "request" } });
  $("details-title").textContent = whole.kind ?? whole.name ?? "Session";
  const id = make("code", {}, whole.job_id ?? whole.model_id ?? whole.session_id);
  $("details-facts").replaceChildren(id, ...gallery(whole, act));
  $("details-json").textContent = JSON.stringify(whole, null, 2);
  $("details").showModal();
}

function tellFailure(error) {
  if (!(error instanceof Refused)) throw error;
  if (error.status === 401) {
    $("health").textContent = "key needed";
    $("health").dataset.state = "bad";
    notice("This gateway asks for an API key: type it above. It is kept in this tab only.");
    $("key").focus();
    return;
  }
  if (error.status === 0) {
    $("health").textContent = "no answer";
    $("health").dataset.state = "bad";
  }
  notice(error.message);
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}
