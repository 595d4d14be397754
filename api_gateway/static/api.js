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

/** The JSON that a route answers with; `accepts` are error statuses whose body is an answer too. */
export async function ask(path, { method = "GET", query = {}, accepts = [] } = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const address = given.length ? `${path}?${new URLSearchParams(given)}` : path;
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  let response;
  try {
    response = await fetch(address, { method, headers, cache: "no-store", signal: AbortSignal.timeout(10_000) });
  } catch (error) {
    throw new Refused(0, "unreachable", `The gateway does not answer (${error.message}).`);
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok && !accepts.includes(response.status)) {
    throw new Refused(response.status, body.code ?? "", body.detail ?? body.title ?? `${response.status} ${response.statusText}`);
  }
  return body;
}
