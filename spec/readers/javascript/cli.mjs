// The command line of the reader, as README, section 16, asks: one line of JSON for each path, exit code 0.
//
//     node cli.mjs check FILE...               node cli.mjs base BASE...              node cli.mjs canonical FILE...
//     node cli.mjs rules FILE...
//     node cli.mjs compute ADAPTER BASE        node cli.mjs merge ADAPTER BASE

import { readFileSync, readdirSync, realpathSync, statSync } from "node:fs";
import { join } from "node:path";
import * as run from "./run.mjs";

const methods = JSON.parse(readFileSync(new URL("../../1.1/methods.json", import.meta.url), "utf-8"));
const bytesOf = (path) => new Uint8Array(readFileSync(path));

// Names of the files below a folder. Links are followed, but not around in a circle; one that leads nowhere is no file.
function filesOf(folder, above = []) {
  const here = realpathSync(folder);
  if (above.includes(here)) return [];
  return readdirSync(folder).flatMap((name) => {
    const path = join(folder, name);
    const found = statSync(path, { throwIfNoEntry: false });
    if (found?.isDirectory()) return filesOf(path, [...above, here]).map((inside) => `${name}/${inside}`);
    return found?.isFile() ? [name] : [];
  });
}

function base(folder) {
  if (statSync(folder).isFile()) return run.baseFile(bytesOf(folder));
  return run.base(filesOf(folder), (name) => bytesOf(join(folder, name)));
}

const [verb, ...paths] = process.argv.slice(2);
const asked = {
  check: (path) => run.check(bytesOf(path), methods),
  base,
  canonical: (path) => run.canonicals(bytesOf(path)),
  rules: (path) => run.rules(bytesOf(path)),
  compute: (adapter, path) => run.computed(bytesOf(adapter), () => bytesOf(path), methods),
  merge: (adapter, path) => run.merged(bytesOf(adapter), () => bytesOf(path), methods),
}[verb];
for (const group of asked.length === 1 ? paths.map((path) => [path]) : [paths]) {
  let line;
  try {
    line = await asked(...group);
  } catch (error) {
    // A path that cannot be read is told by node's code of the error; section 12 gives it a class.
    line = error.syscall ? { ok: false, error: "UsageError", where: "" } : run.told(error);
  }
  console.log(JSON.stringify({ path: group[0], ...line }));
}
