// The images of a job: drawn from their blobs, with the seed and the settings that made them.

import { bitmap } from "/static/api.js";
import { make } from "/static/dom.js";

//: The settings of a run that are shown, in order; the rest stands in the JSON.
const SETTINGS = ["prompt", "negative_prompt", "steps", "guidance_scale", "scheduler", "strength"];

/** What a job's images are: those of its result, or the last preview while it runs; empty for any other job. */
export function imagesOf(job) {
  const made = job.result?.images ?? (job.progress?.preview ? [job.progress.preview] : []);
  return made.filter((image) => image.blob_id && /^image\/(png|webp)$/.test(image.media_type ?? ""));
}

/** The images with what made them, and a button that asks for them again with another seed. */
export function gallery(job, act) {
  const images = imagesOf(job);
  if (!images.length) return [];
  const said = { ...job.request, ...job.result };
  const settings = SETTINGS.filter((name) => said[name] !== undefined && said[name] !== null).flatMap((name) => [
    make("dt", {}, name.replaceAll("_", " ")),
    make("dd", {}, said[name]),
  ]);
  // What was made from latents has no seed to change.
  const again = job.result && "seed" in job.result
    ? make("button", { type: "button", class: "quiet", onclick: () => act("again", job) }, "Again with another seed")
    : null;
  return [make("div", { class: "images" }, images.map(figure)), make("dl", { class: "settings" }, settings), again];
}

function figure(image) {
  const canvas = make("canvas", { width: image.width, height: image.height, role: "img", "aria-label": "image" });
  const caption = make("figcaption", {}, image.seed === undefined ? "preview" : `seed ${image.seed}`);
  bitmap(`/api/blobs/${encodeURIComponent(image.blob_id)}`).then(
    (drawn) => canvas.getContext("2d").drawImage(drawn, 0, 0, canvas.width, canvas.height),
    () => caption.append(" (no longer kept)"),
  );
  return make("figure", {}, canvas, caption);
}
