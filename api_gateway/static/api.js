// The API as this page uses it: JSON in and out, with the key that the person typed.

const STORED = "device-operations.api-key";

/** Raised for an answer that is an error; `status` 0 where there was no answer. */
export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The key, kept for this tab only. */
export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

/** The JSON that a route answers with; `accepts` are error statuses whose body is an answer too, `json` is sent. */
export async function ask(path, { method = "GET", query = {}, accepts = [], json = null } = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const address = given.length ? `${path}?${new URLSearchParams(given)}` : path;
  const response = await send(address, { method, body: json === null ? null : JSON.stringify(json) });
  const body = await response.json().catch(() => ({}));
  if (!response.ok && !accepts.includes(response.status)) {
    throw new Refused(response.status, body.code ?? "", body.detail ?? body.title ?? `${response.status} ${response.statusText}`);
  }
  return body;
}

/** The picture that lies at an address, ready to be drawn. */
export async function bitmap(path) {
  const response = await send(path, {});
  if (!response.ok) throw new Refused(response.status, "", `${response.status} ${response.statusText}`);
  return createImageBitmap(await response.blob());
}

async function send(address, options) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (options.body) headers["Content-Type"] = "application/json";
  try {
    return await fetch(address, { ...options, headers, cache: "no-store", signal: AbortSignal.timeout(10_000) });
  } catch (error) {
    throw new Refused(0, "unreachable", `The gateway does not answer (${error.message}).`);
  }
}
