"use strict";
const $ = (id) => document.getElementById(id);
const make = (tag, given = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "for") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(path, options);
  const text = await answer.text();
  let found;
  try { found = JSON.parse(text); } catch { throw new Error(text.trim() || `answer ${answer.status}`); }
  if (found.error) {
    const { where, why, cure } = found.error;
    throw new Error([where, why].filter(Boolean).join(": ") + (cure ? `. ${cure}` : ""));
  }
  return found;
}

// Forms: required and common fields are shown; all other fields are in a section that the user opens.

const OPEN = new Set(["out", "dst", "base", "target_format", "method", "weights", "rank", "energy", "only_plan",
  "verified", "overwrite", "merged", "layers", "every", "on_loss"]);
let forms = [], form = null, roots = [];
const kept = {};

function field(one) {
  const id = `field-${one.name}`;
  const values = make("div", { className: "values" });
  const row = make("div", { className: "field" });
  if (one.many) row.append(make("span", { className: "label", id: `${id}-label` }, one.label));
  else row.append(make("label", { for: id }, one.label + (one.required ? " (needed)" : "")));
  row.append(values);
  const add = (value = "") => {
    const label = one.many ? { "aria-labelledby": `${id}-label` } : { id };
    const line = make("div", { className: "value" });
    if (one.kind === "flag") {
      line.append(make("input", { type: "checkbox", checked: one.default === "True", ...label, name: one.name }));
    } else if (one.kind === "choice") {
      const select = make("select", { ...label, name: one.name },
        make("option", { value: "" }, one.default ? `(${one.default})` : ""));
      for (const choice of one.choices) select.append(make("option", { value: choice }, choice));
      line.append(select);
    } else {
      const input = make("input", { type: "text", value, ...label, name: one.name, autocomplete: "off",
        spellcheck: false, placeholder: one.default });
      input.addEventListener("input", remember);
      line.append(input);
      if (one.kind === "path") {
        line.append(make("button", { type: "button", "aria-label": `Choose ${one.label}`,
          onclick: () => choose(one, input) }, "Choose"));
      }
      if (one.many && values.children.length) {
        line.append(make("button", { type: "button", "aria-label": `Remove this ${one.label}`,
          onclick: () => { line.remove(); remember(); } }, "Remove"));
      }
    }
    values.append(line);
    return line;
  };
  const before = kept[one.name];
  if (one.many && Array.isArray(before) && before.length) before.forEach(add);
  else if (one.kind === "path" && typeof before === "string") add(before);
  else add();
  if (one.many) {
    row.append(make("div", { className: "help" }, make("button", { type: "button", onclick: () => {
      add().querySelector("input").focus();
    } }, `Add another ${one.label}`)));
  }
  if (one.help) row.append(make("p", { className: "help" }, one.help));
  return row;
}

function remember() {
  const now = filled();
  for (const one of form.fields) {
    if (one.kind === "path" && !["out", "dst", "figures"].includes(one.name)) kept[one.name] = now[one.name];
  }
}

function show(name) {
  form = forms.find((one) => one.name === name);
  for (const button of $("commands").querySelectorAll("button")) {
    if (button.textContent === name) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  const [first, ...rest] = form.help.split("\n\n");
  $("form-title").textContent = first;
  $("form-help").textContent = rest.join("\n\n").replace(/([^\n])\n(?!\n)/g, "$1 ");
  const open = form.fields.filter((one) => one.required || one.kind === "path" && !one.label.startsWith("-") ||
    OPEN.has(one.name) || !one.label.startsWith("-"));
  const others = form.fields.filter((one) => !open.includes(one));
  const more = make("details", {}, make("summary", {}, `${others.length} more options`), ...others.map(field));
  const buttons = make("p", { className: "buttons" }, make("button", { className: "main" }, `Run ${name}`));
  if (name === "combine" || name === "merge") {
    buttons.append(make("button", { type: "button", onclick: conflicts }, "See what a sum keeps"));
  }
  if (name === "merge") buttons.prepend(make("button", { type: "button", id: "plan", onclick: () => run(true) }, "Plan"));
  $("form").replaceChildren(...open.map(field), ...(others.length ? [more] : []), buttons,
    make("p", { id: "form-error", className: "bad", role: "alert" }));
  $("conflicts").hidden = true;
}

function filled() {
  const values = {};
  for (const one of form.fields) {
    const nodes = [...$("form").querySelectorAll(`[name="${one.name}"]`)];
    if (one.kind === "flag") {
      if (nodes[0].checked !== (one.default === "True")) values[one.name] = nodes[0].checked;
      continue;
    }
    const given = nodes.map((node) => node.value.trim()).filter(Boolean);
    if (given.length) values[one.name] = one.many ? given : given[0];
  }
  return values;
}

async function run(plan) {
  const error = $("form-error");
  error.textContent = "";
  const values = filled();
  if (plan) values.only_plan = true;
  const missing = form.fields.find((one) => one.required && values[one.name] === undefined);
  if (missing) {
    error.textContent = `${missing.label} is needed.`;
    $("form").querySelector(`[name="${missing.name}"]`).focus();
    return;
  }
  try {
    watch((await ask("/api/jobs", { command: form.name, values })).number);
  } catch (failure) { error.textContent = failure.message; }
}

// Choosing a path.

let choosing = null;
async function choose(one, input) {
  choosing = input;
  const output = ["out", "dst", "figures"].includes(one.name);
  $("chooser-title").textContent = `Choose ${one.label}`;
  $("chooser-take").textContent = output ? "Write into this folder" : "Take this folder";
  $("chooser").dataset.output = output ? "yes" : "";
  $("chooser").showModal();
  await list(roots.length === 1 ? roots[0] : "");
}

async function list(path) {
  let found;
  try { found = await ask(`/api/files?path=${encodeURIComponent(path)}`); } catch (failure) {
    $("chooser-path").textContent = failure.message;
    return;
  }
  $("chooser-path").textContent = found.path || "Open folders";
  $("chooser").dataset.path = found.path;
  $("chooser-take").hidden = !found.path;
  const line = (entry, label) => make("li", {}, make("button", { type: "button", onclick: () => {
    if (["folder", "adapter", "base", "weights"].includes(entry.kind) && entry.folder !== false) list(entry.path);
    else take(entry.path);
  } }, label, make("span", { className: "kind" }, entry.kind)));
  const lines = [];
  if (found.parent !== null) lines.push(line({ path: found.parent, kind: "folder" }, "Up"));
  for (const entry of found.entries) {
    entry.folder = !/\.(safetensors|gguf|bin|pt|pth|npz|ckpt|nemo)$/i.test(entry.name);
    lines.push(line(entry, entry.name));
  }
  if (found.left_out) lines.push(make("li", {}, `and ${found.left_out} more; type the path instead`));
  $("chooser-list").replaceChildren(...lines);
}

function take(path) {
  choosing.value = $("chooser").dataset.output && path === $("chooser").dataset.path ? `${path}/NAME` : path;
  $("chooser").close();
  choosing.focus();
  remember();
}

// Jobs.

let watched = null, timer = null, command = "";
// Break lines only between words, not inside "--out".
const words = (text) => text.match(/(?:[^\s']+|'[^']*')+/g) ?? [];
const STATES = { waiting: "waits for other jobs", running: "runs", done: "done", failed: "failed", ended: "cancelled" };

async function watch(number) {
  watched = number;
  clearTimeout(timer);
  const job = await ask(`/api/jobs/${number}`);
  if (watched !== number) return;
  const over = !["waiting", "running"].includes(job.state);
  $("job").hidden = false;
  $("job-title").textContent = `Job ${number}: ${job.name}`;
  command = job.command;
  $("job-command").replaceChildren(...words(command).flatMap((word) => [make("span", {}, word), " "]));
  const code = job.state === "failed" ? `, exit code ${job.code}` : "";
  $("job-state").textContent = `${STATES[job.state]}${code}, ${job.seconds} s`;
  $("job-state").className = job.state === "done" ? "good" : job.state === "failed" ? "bad" : "";
  $("job-part").hidden = over;
  if (job.part === null) $("job-part").removeAttribute("value");
  else $("job-part").value = job.part;
  $("end").hidden = over;
  $("again").hidden = !over;
  $("job-said").hidden = !job.said.length;
  $("job-said").textContent = job.said.join("\n");
  $("job-out").hidden = !job.out;
  $("job-out").textContent = job.out;
  const shown = $("job-report").dataset.number === String(number);
  if (over && job.page && !shown) {
    $("job-report").dataset.number = number;
    const source = `/api/jobs/${number}/report`;
    $("job-report").replaceChildren(
      make("p", {}, make("a", { href: source, target: "_blank", rel: "noopener" }, "Open the report in a tab of its own")),
      make("iframe", { src: source, title: "Report", sandbox: "allow-scripts" }));
  } else if (!job.page) {
    delete $("job-report").dataset.number;
    $("job-report").replaceChildren();
  }
  await jobs();
  if (!over) timer = setTimeout(() => watch(number), 500);
}

async function jobs() {
  const found = (await ask("/api/jobs")).jobs;
  $("no-jobs").hidden = found.length > 0;
  $("jobs").replaceChildren(...found.map((job) => make("li", {}, make("button", { type: "button",
    onclick: () => watch(job.number) }, make("span", {}, STATES[job.state]), make("code", {}, job.command)))));
}

// The chart of a weighted sum, for each target. It is computed here from inner products, so that it changes at once
// with the weights. |sum w D|^2 / sum |w D|^2 is 1 if the changes are orthogonal, and below 1 if they work against each
// other.

async function conflicts() {
  const error = $("form-error");
  error.textContent = "";
  const values = filled();
  const adapters = values.adapters || [];
  $("conflicts").hidden = false;
  $("conflicts-told").textContent = "Measuring.";
  $("weights").replaceChildren();
  $("bars").replaceChildren();
  let found;
  try { found = await ask("/api/sums", { adapters, base: values.base || null }); } catch (failure) {
    $("conflicts").hidden = true;
    error.textContent = failure.message;
    return;
  }
  const weights = found.adapters.map((_, at) => Number((values.weights || [])[at] ?? 1));
  const draw = () => {
    const rows = found.targets.map((each) => {
      let whole = 0, parts = 0;
      weights.forEach((w, i) => {
        parts += w * w * each.products[i][i];
        weights.forEach((v, j) => { whole += w * v * each.products[i][j]; });
      });
      return { target: each.target, kept: parts > 0 ? Math.sqrt(Math.max(0, whole) / parts) : 1, parts };
    }).filter((row) => row.parts > 0).sort((a, b) => a.kept - b.kept);
    const total = rows.reduce((sum, row) => sum + row.kept * row.kept * row.parts, 0);
    const parts = rows.reduce((sum, row) => sum + row.parts, 0);
    const all = parts ? Math.sqrt(total / parts) : 1;
    $("conflicts-told").textContent = `The sum is ${(100 * all).toFixed(0)} % as large as a sum of orthogonal changes. ` +
      `Below 100 %, the adapters work against each other. ${rows.length} targets, the most conflicting first.`;
    $("bars").setAttribute("aria-label", rows.slice(0, 12)
      .map((row) => `${row.target} ${(100 * row.kept).toFixed(0)} %`).join(", "));
    $("bars").replaceChildren(...rows.slice(0, 24).map((row) => {
      const filledPart = make("span");
      filledPart.style.width = `${Math.min(100, 100 * row.kept / 1.4142)}%`;
      return make("div", { className: "bar" }, make("span", {}, row.target), make("span", { className: "track" }, filledPart),
        make("span", { className: "number" }, `${(100 * row.kept).toFixed(0)} %`));
    }));
  };
  $("weights").replaceChildren(...found.adapters.map((name, at) => {
    const number = make("output", {}, weights[at].toFixed(2));
    const slider = make("input", { type: "range", min: "-1", max: "2", step: "0.05", value: String(weights[at]),
      "aria-label": `Weight of ${name}`, oninput: () => {
        weights[at] = Number(slider.value);
        number.textContent = weights[at].toFixed(2);
        setWeights(weights);
        draw();
      } });
    return make("div", { className: "weight" }, make("span", {}, name), slider, number);
  }));
  draw();
}

function setWeights(weights) {
  const add = [...$("form").querySelectorAll("button")].find((one) => one.textContent === "Add another --weight");
  if (!add) return;
  while ($("form").querySelectorAll('[name="weights"]').length < weights.length) add.click();
  $("form").querySelectorAll('[name="weights"]').forEach((node, at) => { node.value = String(weights[at] ?? ""); });
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); run(false); });
$("copy").addEventListener("click", () => navigator.clipboard.writeText(command));
$("end").addEventListener("click", () => ask(`/api/jobs/${watched}/end`, {}).then(() => watch(watched)));
$("again").addEventListener("click", () => ask(`/api/jobs/${watched}/again`, {}).then((job) => watch(job.number)));
$("chooser-take").addEventListener("click", () => take($("chooser").dataset.path));
$("chooser-close").addEventListener("click", () => $("chooser").close());

ask("/api/start").then((found) => {
  forms = found.forms;
  roots = found.roots;
  $("roots").textContent = `Open: ${roots.join(", ")}`;
  $("commands").replaceChildren(...forms.map((one) => make("li", {}, make("button", { type: "button",
    onclick: () => show(one.name) }, one.name))));
  show("inspect");
  jobs();
}).catch((failure) => { $("form-title").textContent = failure.message; });
