// Checks one file by the reader, away from the page, so that a hostile file cannot freeze it.

import { AdapterError, readAdapter } from "../adapterkit.mjs";

const shown = (value) => (typeof value === "bigint" ? String(value) : value);

async function checked(bytes, methods) {
  const adapter = readAdapter(bytes, methods);
  adapter.checkValues();
  const base = adapter.record.get("base");
  const updates = adapter.targets.flatMap(({ target, updates: each }) =>
    each.map(({ method, tensors, attributes }) => ({
      target: target.name,
      method: method.name,
      tensors: [...tensors].map(([field, { dtype, sizes }]) => `${field} ${dtype} [${sizes.join(", ")}]`),
      attributes: [...attributes].map(([name, value]) => `${name} = ${shown(value)}`),
    })),
  );
  return {
    version: adapter.record.get("version"),
    base: base && [base.get("id"), base.get("revision")].filter(Boolean).join(" @ "),
    lineage: (adapter.record.get("recipe") ?? []).map((step) => step.get("op")),
    digest: await adapter.digest(),
    count: updates.length,
    updates: updates.slice(0, 200),
  };
}

self.onmessage = async ({ data: { file, methods } }) => {
  try {
    self.postMessage({ ok: true, ...(await checked(new Uint8Array(await file.arrayBuffer()), methods)) });
  } catch (error) {
    if (!(error instanceof AdapterError)) self.postMessage({ ok: false, error: "Not readable", where: "", why: String(error.message) });
    else {
      const why = error.message.slice(error.where ? error.where.length + 2 : 0); // the place is shown beside it
      self.postMessage({ ok: false, error: error.error, where: error.where, why });
    }
  }
};
