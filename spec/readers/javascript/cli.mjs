// The command line of the reader, as README, section 16, asks: one line of JSON for each path, exit code 0.
//
//     node cli.mjs check FILE...               node cli.mjs base BASE...              node cli.mjs canonical FILE...
//     node cli.mjs rules FILE...
//     node cli.mjs compute ADAPTER BASE        node cli.mjs merge ADAPTER BASE

import { readFileSync, readdirSync, statSync } from "node:fs";
import { join, relative } from "node:path";
import * as run from "./run.mjs";

const methods = JSON.parse(readFileSync(new URL("../../1.1/methods.json", import.meta.url), "utf-8"));
const bytesOf = (path) => new Uint8Array(readFileSync(path));

function base(folder) {
  if (statSync(folder).isFile()) return run.baseFile(bytesOf(folder));
  const entries = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((entry) => !entry.isDirectory());
  const files = entries.map((entry) => relative(folder, join(entry.parentPath, entry.name)).replaceAll("\\", "/"));
  return run.base(files, (name) => bytesOf(join(folder, name)));
}

const [verb, ...paths] = process.argv.slice(2);
const asked = {
  check: (path) => run.check(bytesOf(path), methods),
  base,
  canonical: (path) => run.canonicals(bytesOf(path)),
  rules: (path) => run.rules(bytesOf(path)),
  compute: (...pair) => run.computed(...pair.map(bytesOf), methods),
  merge: (...pair) => run.merged(...pair.map(bytesOf), methods),
}[verb];
for (const group of asked.length ? paths.map((path) => [path]) : [paths]) {
  let line;
  try {
    line = await asked(...group);
  } catch (error) {
    // A path that cannot be read is told by node's code of the error; section 12 gives it a class.
    line = error.syscall ? { ok: false, error: "UsageError", where: "" } : run.told(error);
  }
  console.log(JSON.stringify({ path: group[0], ...line }));
}
