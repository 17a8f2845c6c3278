// The page: asks v1/predict and v1/neighbours, and shows what they answer. Paths are relative, so
// that it works below any prefix of a proxy. All text is set as text, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const NAMED = 4; // labels of a document
const RETRY = 1500; // milliseconds until a model that starts is asked again
const SHOWN = ["P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@100"];
const number = new Intl.NumberFormat("en");
let info = null;
let pictures = []; // {file, url, data}
let asking = null; // AbortController of the query that is being answered

function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// What the server answers; throws an Error with its own line.
async function ask(path, body, signal) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, { ...options, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it running?");
  }
  const content = await answer.json().catch(() => ({}));
  if (answer.ok) return content;
  const error = new Error(content.error || `The server answers with ${answer.status}.`);
  error.status = answer.status;
  throw error;
}

async function begin() {
  try {
    info = await ask("v1/info");
  } catch (error) {
    if (error.status !== 503) return complain(error.message);
    say("The model is being loaded …");
    return setTimeout(begin, RETRY);
  }
  say("");
  $("name").textContent = info.name;
  document.title = `${info.name} · label ranking`;
  const documents = info.documents ? `, trained on ${count(info.documents, "document")}` : "";
  $("about").textContent = `Ranks the ${count(info.labels, "label")} of ${info.dataset}${documents}.`;
  $("images").hidden = !info.images.possible;
  if (info.images.possible) {
    $("files").multiple = info.images.per_query > 1;
    document.querySelector("label[for=files]").textContent =
      info.images.per_query > 1 ? `Add pictures, up to ${info.images.per_query}` : "Add a picture";
  }
  $("rankings").hidden = info.rankings.length < 2;
  $("near").hidden = !info.shows_documents;
  $("results").classList.toggle("both", info.shows_documents);
  $("k").max = info.limits.max_k;
  $("text").maxLength = info.limits.max_text;
  $(info.rankings[0]).checked = true;
  showModel();
  showExamples();
  recall();
}

function showModel() {
  const kinds = Object.keys(info.metrics);
  const names = SHOWN.filter((name) => kinds.some((kind) => name in info.metrics[kind]));
  const head = $("model").querySelector("thead");
  head.append(element("tr", {}, element("td"), ...names.map((name) => element("th", { scope: "col" }, name))));
  for (const kind of kinds) {
    const cells = names.map((name) => {
      const value = info.metrics[kind][name];
      return element("td", {}, value === undefined ? "–" : (100 * value).toFixed(2));
    });
    const row = element("tr", {}, element("th", { scope: "row" }, kind), ...cells);
    $("model").querySelector("tbody").append(row);
  }
  $("model").querySelector(".scroll").hidden = !kinds.length;
  const facts = {
    exported: info.created.slice(0, 10),
    digest: info.digest.slice(0, 16),
    server: `xmc_jax ${info.version}`,
  };
  if (!info.images.possible) facts.pictures = `not possible: ${info.images.reason}`;
  for (const [name, value] of Object.entries(facts)) {
    $("model").querySelector("dl").append(element("dt", {}, name), element("dd", {}, value));
  }
  $("model").hidden = false;
}

function showExamples() {
  for (const text of info.examples) {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      $("text").value = text;
      $("text").focus();
      rank();
    });
    $("examples").append(element("li", {}, button));
  }
  $("empty").hidden = !info.examples.length;
}

// Pictures of the query

function showPictures() {
  $("pictures").replaceChildren(...pictures.map((picture, at) => {
    const image = element("img", { src: picture.url, alt: `Picture ${at + 1}: ${picture.file.name}` });
    const remove = element("button", { type: "button", "aria-label": `Remove ${picture.file.name}` }, "×");
    remove.addEventListener("click", () => {
      URL.revokeObjectURL(picture.url);
      pictures.splice(at, 1);
      showPictures();
      $("files").focus();
    });
    return element("li", {}, image, remove);
  }));
  $("pictures").hidden = !pictures.length;
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${file.name} cannot be read.`)));
    reader.readAsDataURL(file);
  });
}

async function addPictures(files) {
  complain("");
  for (const file of files) {
    if (pictures.length >= info.images.per_query) {
      complain(`A document has at most ${info.images.per_query} pictures here.`);
      break;
    }
    if (file.size > info.limits.max_image_bytes) {
      complain(`${file.name} is larger than ${(info.limits.max_image_bytes / 2 ** 20).toFixed(0)} MiB.`);
      continue;
    }
    try {
      const data = await read(file);
      // The type is the browser's guess; what it is, the server looks at itself.
      pictures.push({ file, url: URL.createObjectURL(file), data: data.slice(data.indexOf(",") + 1) });
    } catch (error) {
      complain(error.message);
    }
  }
  showPictures();
}

// Ranking

function chosen() {
  const radio = document.querySelector("input[name=ranking]:checked");
  return radio && info.rankings.length > 1 ? radio.value : info.rankings[0];
}

async function rank() {
  if (!info || !$("form").reportValidity()) return;
  const text = $("text").value.trim();
  complain("");
  if (!text && !pictures.length) {
    complain(info.images.possible ? "Give a text or a picture." : "Give a text.");
    $("text").focus();
    return;
  }
  if (asking) asking.abort();
  const own = asking = new AbortController();
  const k = Number($("k").value);
  const queries = [{ text, images: pictures.map((picture) => picture.data) }];
  remember(text, k);
  busy(true);
  const started = performance.now();
  try {
    const [labels, documents] = await Promise.all([
      ask("v1/predict", { queries, k, ranking: chosen() }, own.signal),
      info.shows_documents ? ask("v1/neighbours", { queries, k }, own.signal) : null,
    ]);
    const found = labels.results[0].labels;
    show($("labels"), found, "label", labels.ranking === "augmented", () => []);
    if (documents) showDocuments(documents.results[0].documents);
    $("empty").hidden = true;
    $("results").hidden = false;
    const near = documents ? ` and ${count(documents.results[0].documents.length, "document")}` : "";
    say(`${count(found.length, "label")}${near} in ${Math.round(performance.now() - started)} ms`);
  } catch (error) {
    if (error.name !== "AbortError") {
      say("");
      complain(inWords(error.message));
    }
  }
  if (asking === own) {
    asking = null;
    busy(false);
  }
}

// Where something is wrong, as the page has it.
function inWords(line) {
  return line
    .replace(/^queries\[0\]\.images\[(\d+)\]: (image: )?/, (_, at) => `Picture ${Number(at) + 1}: `)
    .replace(/^queries\[0\](\.\w+)?: /, "");
}

function count(n, what) {
  return `${number.format(n)} ${what}${n === 1 ? "" : "s"}`;
}

function busy(is) {
  $("rank").disabled = is;
  $("rank").textContent = is ? "Ranking …" : "Rank";
  $("results").setAttribute("aria-busy", is);
  if (is) say("Ranking …");
}

// A list of what was ranked. Bars are inner products as they are, from 0 to 1, and mixed scores,
// which are small where there are many labels, as shares of the best.
function show(list, items, kind, mixed, more) {
  const pictured = items.some((item) => item.image);
  list.classList.toggle("pictured", pictured);
  const whole = mixed && items.length ? items[0].score : 1;
  list.replaceChildren(...items.map((item, at) => {
    const row = element("li", {}, element("span", { class: "number", "aria-hidden": "true" }, String(at + 1)));
    if (pictured) row.append(picture(item, kind));
    const what = element("div", { class: "what" }, item.text || item.id);
    if (item.text && !item.text.startsWith(item.id)) what.append(element("span", { class: "name" }, item.id));
    what.append(...more(item));
    const score = element("span", { class: "score" }, element("span", { class: "hidden" }, "score "), format(item.score));
    const bar = element("span", { class: "bar", "aria-hidden": "true" }, element("i"));
    bar.firstChild.style.setProperty("--share", `${100 * Math.min(Math.max(item.score / whole, 0), 1)}%`);
    row.append(what, score, bar);
    return row;
  }));
  if (!items.length) list.append(element("p", { class: "none" }, "None."));
}

function picture(item, kind) {
  if (!item.image) return element("span", { class: "picture", "aria-hidden": "true" });
  const image = element("img", { class: "picture", alt: `Picture of ${kind} ${item.id}`, loading: "lazy", width: 48, height: 48 });
  image.src = item.image;
  return image;
}

function format(score) {
  return Math.abs(score) >= 0.1 ? score.toFixed(3) : score.toPrecision(2);
}

function showDocuments(documents) {
  show($("documents"), documents, "document", false, (item) => {
    if (!item.labels.length) return [];
    const names = item.labels.slice(0, NAMED).map((label) => {
      const short = !label.text || label.text.startsWith(label.id);
      return element("span", { class: "label", title: label.text }, short ? label.id : label.text);
    });
    const more = item.labels.length > NAMED ? ["…"] : [];
    return [element("span", { class: "of" }, element("span", { class: "hidden" }, "labels "), ...names, ...more)];
  });
}

// The query is in the address, so that it can be kept and sent.

function remember(text, k) {
  const query = new URLSearchParams({ q: text, k, ranking: chosen() });
  history.replaceState(null, "", `#${query}`);
}

function recall() {
  const query = new URLSearchParams(location.hash.slice(1));
  const ranking = query.get("ranking");
  if (info.rankings.includes(ranking)) $(ranking).checked = true;
  if (/^\d+$/.test(query.get("k") || "")) $("k").value = query.get("k");
  if (query.get("q")) {
    $("text").value = query.get("q");
    rank();
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  rank();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    rank();
  }
});
$("files").addEventListener("change", async () => {
  await addPictures([...$("files").files]);
  $("files").value = ""; // so that the same file may be chosen again
});
for (const radio of document.querySelectorAll("input[name=ranking]")) {
  radio.addEventListener("change", () => {
    if (!$("results").hidden) rank();
  });
}
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("form").addEventListener(kind, (event) => {
    if (!info || !info.images.possible || !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("form").classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") addPictures([...event.dataTransfer.files]);
  });
}
$("text").addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (!files.length || !info || !info.images.possible) return;
  event.preventDefault();
  addPictures(files);
});
window.addEventListener("hashchange", () => info && recall());
begin();
