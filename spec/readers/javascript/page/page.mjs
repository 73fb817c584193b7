// The page: takes files that are dropped or chosen, has a worker check each, and shows what it says.

const SECONDS = 120; // a worker that takes longer is stopped
const element = (name, text, into) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text; // never HTML: all texts may come from a file
  into?.append(made);
  return made;
};
const [drop, files, status, results] = ["drop", "files", "status", "results"].map((id) => document.getElementById(id));
const source = document.getElementById("worker").textContent;
const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));

function check(file) {
  return new Promise((done) => {
    const worker = new Worker(address);
    const end = (answer) => {
      clearTimeout(timer);
      worker.terminate();
      done(answer);
    };
    const fault = (why) => end({ ok: false, error: "Not readable", where: "", why });
    const timer = setTimeout(() => fault(`checking took longer than ${SECONDS} seconds`), SECONDS * 1000);
    worker.onmessage = ({ data }) => end(data);
    worker.onerror = (event) => fault(event.message || "the browser could not hold the file");
    worker.postMessage({ file, methods: METHODS });
  });
}

function facts(pairs, into) {
  const list = element("dl", undefined, into);
  for (const [name, value] of pairs.filter((pair) => pair[1])) {
    element("dt", name, list);
    element("dd", value, list);
  }
}

function show(file, answer) {
  const article = element("article");
  article.className = answer.ok ? "valid" : "invalid";
  element("h2", file.name, article);
  element("p", answer.ok ? "Valid" : `Not valid: ${answer.error}`, article).className = "verdict";
  if (!answer.ok) facts([["Place", answer.where], ["Reason", answer.why]], article);
  else {
    facts([["Specification", answer.version], ["Base", answer.base], ["Lineage", answer.lineage.join(", ")],
      ["Digest", answer.digest]], article);
    const frame = element("div", undefined, article);
    frame.className = "table";
    frame.tabIndex = 0; // scrolled by keyboard where it is wider than the page
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", `Updates of ${file.name}`);
    const table = element("table", undefined, frame);
    const rest = answer.count - answer.updates.length;
    element("caption", `${answer.count} ${answer.count === 1 ? "update" : "updates"}${rest ? `; the first ${answer.updates.length}` : ""}`, table);
    const head = element("tr", undefined, element("thead", undefined, table));
    for (const name of ["Target", "Method", "Tensors", "Attributes"]) element("th", name, head).scope = "col";
    const body = element("tbody", undefined, table);
    for (const update of answer.updates) {
      const row = element("tr", undefined, body);
      for (const text of [update.target, update.method, update.tensors.join("; "), update.attributes.join("; ")]) element("td", text, row);
    }
  }
  results.prepend(article);
}

async function checkAll(list) {
  for (const file of list) {
    status.textContent = `Checking ${file.name} ...`;
    const answer = await check(file);
    show(file, answer);
    status.textContent = answer.ok ? `${file.name} is valid.` : `${file.name} is not valid: ${answer.why}`;
  }
}

files.addEventListener("change", () => checkAll([...files.files]));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault(); // a browser would open a file that is dropped beside the box
    drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") checkAll([...event.dataTransfer.files]);
  });
}
