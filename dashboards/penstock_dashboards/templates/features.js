// The browser: a list of latents to search and sort, and beside it the one that is read.

const ROW = 62;  // height of a row of the list, as in the style sheet
const MOST_ROWS = 250_000;  // browsers cannot make an element much higher
const SEPARATOR = "\u0001";
let LATENTS, TEXTS;  // the index's arrays, and the tokens' texts
let ROW_OF;  // by latent

const narrow = () => matchMedia("(max-width: 820px)").matches;
const number = value => text(value, 0);
const figure = value => value === 0 ? "0" : Math.abs(value) >= 1000 ? number(value) : String(+value.toPrecision(3));
const even = value => value >= 1000 ? number(value) : value.toPrecision(3);  // of one length, to stand below each other
const percent = share => share === 0 ? "0%" : share < 1e-6 ? `${(100 * share).toExponential(1)}%` : `${+(100 * share).toPrecision(3)}%`;

// ---- tokens ---------------------------------------------------------------------------------------------------------

const UNSEEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\u00a0\u3164]/u;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/g;
const LETTERS = /\p{L}/gu;
const SHAPES = { "\n": "↵", "\r": "␍", "\t": "⇥" };
const LONG_BLANK = 4;

/** A token's text as nodes: what has no shape of its own is given one. `lines`: as it is laid out, so a newline ends the
    line, too; else a long blank is told by its length. */
function shapes(given, lines = false) {
  if (given === "") return [element("i", {}, "∅")];
  const blank = given.trim() === "";
  if (!blank && !UNSEEN.test(given)) return [given];
  const found = [];
  for (const part of blank ? given.split(/( +)/).filter(Boolean) : [given])
    if (blank && part[0] === " ") found.push(element("i", {}, part.length > LONG_BLANK && !lines ? `·×${part.length}` : "·".repeat(part.length)));
    else for (const character of part) {
      const shape = SHAPES[character] ?? (UNSEEN.test(character) ? `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}` : null);
      if (shape !== null) found.push(element("i", {}, shape), character === "\n" && lines ? "\n" : "");
      else found.push(character);
    }
  return found;
}

const quoted = token => JSON.stringify(TEXTS[token]);
const spoken = token => element("code", { className: "token" }, shapes(TEXTS[token]));

/** 0 where a token does not fire, else 1 to 8 by its share of the latent's largest activation. */
const heat = (value, most) => value > 0 ? Math.max(1, Math.min(8, Math.ceil(8 * value / most))) : 0;

function tokenSpan(token, level, isPeak, lines) {
  const made = element(isPeak ? "mark" : "span", { className: level ? `t h${level}` : "t" }, shapes(TEXTS[token], lines));
  made.dataset.token = token;
  return made;
}

// ---- the latents there are ------------------------------------------------------------------------------------------

async function readIndex() {
  if (typeof DecompressionStream === "undefined")
    throw new Error("it lacks DecompressionStream. Chrome and Edge 80, Firefox 113, Safari 16.4 and newer ones have it");
  const { arrays, texts } = await embedded("index");
  LATENTS = arrays;
  TEXTS = texts;
  ROW_OF = new Map();
  LATENTS.latent.forEach((latent, row) => ROW_OF.set(latent, row));
  LATENTS.topStarts = starts(LATENTS.top_tokens_counts);
  LATENTS.bottomStarts = starts(LATENTS.bottom_tokens_counts);
  LATENTS.nearStarts = starts(LATENTS.near_counts);  // examples, by latent
  LATENTS.tokenStarts = starts(LATENTS.near_lengths);  // tokens, by example
  LATENTS.agreement = agreements();
}

/** Of each latent's top examples, the share that has the commonest peak token. */
function agreements() {
  const found = new Float32Array(LATENTS.latent.length), seen = new Map();
  for (let row = 0; row < found.length; row++) {
    seen.clear();
    let most = 0;
    for (let example = LATENTS.nearStarts[row]; example < LATENTS.nearStarts[row + 1]; example++) {
      const count = (seen.get(peakToken(example)) ?? 0) + 1;
      seen.set(peakToken(example), count);
      if (count > most) most = count;
    }
    found[row] = most / Math.max(1, LATENTS.near_counts[row]);
  }
  return found;
}

const peakToken = example => LATENTS.near_tokens[LATENTS.tokenStarts[example] + LATENTS.near_peaks[example]];

// ---- what is asked for: kept in the address, so that a link shows the same ------------------------------------------

const SORTS = {  // label, its figure by row, whether the highest comes first
  match: ["Best match", row => found?.score[row] ?? 0, true],
  latent: ["Latent number", row => LATENTS.latent[row], false],
  rate: ["Firing rate", row => LATENTS.firing_rate[row], true],
  max: ["Max activation", row => LATENTS.max_activation[row], true],
  mean: ["Mean activation", row => LATENTS.mean_activation[row], true],
  agreement: ["Agreement of peak tokens", row => LATENTS.agreement[row], true],
};
const PLACES = { all: "Everywhere", peak: "Peak tokens", around: "Around peaks", top: "Promoted", bottom: "Suppressed" };
const SHOWN = { alive: "Those that fired", all: "All", dead: "Dead ones" };
const STATE = { latent: null, words: "", where: "all", show: "alive", sort: "", turned: false };

function address() {
  const parts = new URLSearchParams();
  if (STATE.latent !== null) parts.set("latent", STATE.latent);
  if (STATE.words) parts.set("q", STATE.words);
  if (STATE.where !== "all") parts.set("in", STATE.where);
  if (STATE.show !== "alive") parts.set("show", STATE.show);
  if (STATE.sort) parts.set("sort", STATE.sort);
  if (STATE.turned) parts.set("order", "turned");
  return String(parts) ? `#${parts}` : location.pathname + location.search;
}

function remember(push = false) {
  try {
    if (push) history.pushState(null, "", address());
    else history.replaceState(null, "", address());
  } catch {}  // a frame without an address of its own
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const one = (name, among, otherwise) => Object.hasOwn(among, parts.get(name) ?? "") ? parts.get(name) : otherwise;
  const latent = /^\d+$/.test(parts.get("latent") ?? "") ? Number(parts.get("latent")) : null;
  STATE.latent = ROW_OF.has(latent) ? latent : null;
  STATE.words = parts.get("q") ?? "";
  STATE.where = one("in", PLACES, "all");
  STATE.show = one("show", SHOWN, "alive");
  STATE.sort = one("sort", SORTS, "");
  STATE.turned = parts.get("order") === "turned";
  if (latent !== null && STATE.latent === null) say(`This SAE has no latent ${latent}`);
  if (STATE.latent !== null && STATE.show !== "all" && (STATE.show === "dead") === (LATENTS.fired[ROW_OF.get(STATE.latent)] > 0)) STATE.show = "all";
}

const sortedBy = () => STATE.sort && (STATE.sort !== "match" || found) ? STATE.sort : found ? "match" : "latent";

// ---- the search -----------------------------------------------------------------------------------------------------

let found = null;  // what the words find: `score`, and why, by row
let NEAR = null;  // the text around the peaks: a string a latent, and where in it its examples and their peaks are

function near() {
  if (NEAR) return NEAR;
  const lower = TEXTS.map(one => one.toLowerCase()), examples = LATENTS.near_lengths.length;
  NEAR = { texts: [], begin: new Uint32Array(examples), from: new Uint32Array(examples), to: new Uint32Array(examples), lower };
  const { near_tokens: tokens, near_peaks: peaks, near_lengths: lengths, nearStarts, tokenStarts } = LATENTS;
  for (let row = 0; row < LATENTS.latent.length; row++) {
    let said = "";
    for (let example = nearStarts[row]; example < nearStarts[row + 1]; example++) {
      NEAR.begin[example] = said.length;
      for (let i = 0; i < lengths[example]; i++) {
        if (i === peaks[example]) NEAR.from[example] = said.length;
        said += lower[tokens[tokenStarts[example] + i]];
        if (i === peaks[example]) NEAR.to[example] = said.length;
      }
      said += SEPARATOR;
    }
    NEAR.texts.push(said);
  }
  return NEAR;
}

/** What the words ask for: `"in quotes"` is a whole token as it is, \n and \t are a newline and a tab. */
function needle() {
  const unescaped = STATE.words.replace(/\\n|↵/g, "\n").replace(/\\t|⇥/g, "\t");
  const exact = /^\s*"([^]+)"\s*$/.exec(unescaped);
  if (exact) return { exact: true, text: exact[1] };
  const trimmed = unescaped.replace(/^ +| +$/g, "").toLowerCase();
  return trimmed ? { exact: false, text: trimmed } : null;
}

function search() {
  const asked = needle();
  if (!asked) return null;
  const rows = LATENTS.latent.length, { texts, begin, from, to, lower } = near();
  const made = { score: new Float32Array(rows), peaks: new Uint16Array(rows), around: new Uint16Array(rows),
                 shown: new Int32Array(rows).fill(-1), top: new Int16Array(rows).fill(-1), bottom: new Int16Array(rows).fill(-1), number: null };
  const fits = asked.exact ? TEXTS.map(one => one === asked.text) : lower.map(one => one.includes(asked.text));
  const any = fits.includes(true);
  const inside = name => STATE.where === "all" || STATE.where === name;
  const { nearStarts, tokenStarts, near_lengths: lengths, near_tokens: tokens, top_tokens, topStarts, bottom_tokens, bottomStarts } = LATENTS;
  const within = (all, offsets, row) => {
    for (let i = offsets[row]; i < offsets[row + 1]; i++) if (fits[all[i]]) return i - offsets[row];
    return -1;
  };
  for (let row = 0; row < rows; row++) {
    if (inside("top") && any) made.top[row] = within(top_tokens, topStarts, row);
    if (inside("bottom") && any) made.bottom[row] = within(bottom_tokens, bottomStarts, row);
    if (STATE.where !== "top" && STATE.where !== "bottom") {
      const last = nearStarts[row + 1];
      let example = nearStarts[row], counted = -1, peaked = -1;
      const hit = (which, atPeak) => {
        if (STATE.where === "peak" && !atPeak) return;
        if (which !== counted) {
          if (!made.around[row]++) made.shown[row] = which;
          counted = which;
        }
        if (atPeak && which !== peaked) {
          if (!made.peaks[row]++) made.shown[row] = which;
          peaked = which;
        }
      };
      if (asked.exact) {
        if (any) for (; example < last; example++)
          for (let i = 0; i < lengths[example]; i++)
            if (fits[tokens[tokenStarts[example] + i]]) hit(example, i === LATENTS.near_peaks[example]);
      } else {
        const said = texts[row], size = asked.text.length;
        for (let at = said.indexOf(asked.text); at >= 0; at = said.indexOf(asked.text, at + 1)) {
          while (example + 1 < last && begin[example + 1] <= at) example++;
          hit(example, at < to[example] && at + size > from[example]);
        }
      }
    }
    const count = Math.max(1, LATENTS.near_counts[row]);
    made.score[row] = 100 * made.peaks[row] / count + 20 * made.around[row] / count
      + (made.top[row] >= 0 ? 30 - made.top[row] : 0) + (made.bottom[row] >= 0 ? 5 : 0);
  }
  const asNumber = /^\s*#?(\d+)\s*$/.exec(STATE.words);
  if (asNumber && ROW_OF.has(Number(asNumber[1]))) {
    made.number = ROW_OF.get(Number(asNumber[1]));
    made.score[made.number] = 1e6;
  }
  return made;
}

/** Why a row was found, in a few words. */
function why(row) {
  const count = LATENTS.near_counts[row], { topStarts, bottomStarts, top_tokens, bottom_tokens } = LATENTS;
  if (found.number === row) return "this number";
  if (found.peaks[row]) return `peak in ${found.peaks[row]} of ${count}`;
  if (found.top[row] >= 0) return ["promotes ", spoken(top_tokens[topStarts[row] + found.top[row]])];
  if (found.around[row]) return `nearby in ${found.around[row]} of ${count}`;
  return ["suppresses ", spoken(bottom_tokens[bottomStarts[row] + found.bottom[row]])];
}

// ---- the list -------------------------------------------------------------------------------------------------------

let ORDER = new Uint32Array();  // the rows that are listed
let PLACE = new Map();  // of a row in it
const DRAWN = new Map();

function arrange() {
  found = search();
  const rows = [], name = sortedBy();
  for (let row = 0; row < LATENTS.latent.length; row++) {
    const fired = LATENTS.fired[row] > 0;
    if (found && found.number === row) rows.push(row);
    else if ((STATE.show === "all" || (STATE.show === "alive") === fired) && (!found || found.score[row] > 0)) rows.push(row);
  }
  const [, value, highest] = SORTS[name], sign = highest !== STATE.turned ? -1 : 1;
  const values = new Float64Array(LATENTS.latent.length);
  for (const row of rows) values[row] = name !== "latent" && name !== "match" && !LATENTS.fired[row] ? Infinity : sign * value(row);
  ORDER = Uint32Array.from(rows).sort((a, b) => values[a] - values[b] || a - b);
  PLACE = new Map();
  ORDER.forEach((row, place) => PLACE.set(row, place));
  const listed = Math.min(ORDER.length, MOST_ROWS);
  byId("rows").style.height = `${listed * ROW}px`;
  byId("count").textContent = ORDER.length === 0
    ? `No latent ${found ? "is found" : "to show"}${STATE.show === "alive" && found ? " among those that fired" : ""}.`
    : `${number(ORDER.length)} of ${number(LATENTS.latent.length)} latents${listed < ORDER.length ? `; the first ${number(listed)} are listed` : ""}`;
  DRAWN.forEach(made => made.remove());
  DRAWN.clear();
  drawControls();
  drawRows();
}

function drawControls() {
  const name = sortedBy(), highest = SORTS[name][2] !== STATE.turned;
  byId("sort").replaceChildren(...Object.entries(SORTS).filter(([one]) => one !== "match" || found)
    .map(([one, [label]]) => element("option", { value: one, selected: one === name }, label)));
  byId("where").value = STATE.where;
  byId("show").value = STATE.show;
  if (byId("search").value !== STATE.words) byId("search").value = STATE.words;
  byId("direction").textContent = highest ? "↓" : "↑";
  byId("direction").ariaLabel = byId("direction").title = highest ? "Highest first; turn the order round" : "Lowest first; turn the order round";
}

/** The rows that can be seen, and a few beyond: those that are there already stay. */
function drawRows() {
  const list = byId("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(ORDER.length, MOST_ROWS, first + Math.ceil((list.clientHeight || 600) / ROW) + 8);
  for (const [place, made] of DRAWN)
    if (place < first || place >= last) {
      made.remove();
      DRAWN.delete(place);
    }
  for (let place = first; place < last; place++)
    if (!DRAWN.has(place)) {
      DRAWN.set(place, option(place));
      byId("rows").append(DRAWN.get(place));
    }
  markPicked();
}

function option(place) {
  const row = ORDER[place], fired = LATENTS.fired[row] > 0, reason = found ? why(row) : null;
  const made = element("div", { className: "option", role: "option", id: `option-${LATENTS.latent[row]}` },
    element("p", { className: "top" }, element("b", {}, String(LATENTS.latent[row])),
      reason ? element("span", { className: "why" }, reason) : null,
      element("span", { className: "soft figures-of" }, fired ? `${percent(LATENTS.firing_rate[row])} · max ${figure(LATENTS.max_activation[row])}` : "never fired")),
    element("p", { className: "snippet" }, snippet(row, found ? found.shown[row] : -1)));
  made.setAttribute("aria-setsize", ORDER.length);
  made.setAttribute("aria-posinset", place + 1);
  made.style.top = `${place * ROW}px`;
  made.dataset.row = row;
  return made;
}

/** The tokens around the peak of an example, a latent's first one unless told; of one that has none, what it promotes. */
function snippet(row, shown = -1, before = Infinity) {
  const example = shown >= 0 ? shown : LATENTS.nearStarts[row];
  if (LATENTS.nearStarts[row] === LATENTS.nearStarts[row + 1]) {
    const promoted = [...LATENTS.top_tokens.subarray(LATENTS.topStarts[row], LATENTS.topStarts[row + 1])].slice(0, 4);
    return promoted.length ? ["promotes ", ...promoted.flatMap(token => [spoken(token), " "])] : ["–"];
  }
  const begin = LATENTS.tokenStarts[example], made = [];
  for (let i = Math.max(0, LATENTS.near_peaks[example] - before); i < LATENTS.near_lengths[example]; i++) {
    const isPeak = i === LATENTS.near_peaks[example];
    made.push(element(isPeak ? "mark" : "span", { className: isPeak ? "t h5" : "t" }, shapes(TEXTS[LATENTS.near_tokens[begin + i]])));
  }
  return made;
}

function markPicked() {
  const row = STATE.latent === null ? null : ROW_OF.get(STATE.latent);
  for (const made of DRAWN.values()) made.setAttribute("aria-selected", Number(made.dataset.row) === row);
  const at = DRAWN.get(PLACE.get(row));
  if (at) byId("list").setAttribute("aria-activedescendant", at.id);
  else byId("list").removeAttribute("aria-activedescendant");
}

let listTop = 0, lastRead = null;  // a list that is hidden forgets where it stood

function reveal(latent = STATE.latent) {
  const place = PLACE.get(ROW_OF.get(latent)), list = byId("list");
  if (place === undefined || !list.clientHeight) return;
  const top = place * ROW;
  if (top < list.scrollTop || top + ROW > list.scrollTop + list.clientHeight)
    list.scrollTop = top < list.scrollTop && top > list.scrollTop - 2 * ROW ? top
      : top + ROW - list.clientHeight < list.scrollTop + 2 * ROW && top > list.scrollTop ? top + ROW - list.clientHeight
      : top - list.clientHeight / 2;
  drawRows();
}

/** Pick the latent `by` places further down the list; from none, the first or the last one. */
function step(by) {
  if (!ORDER.length) return;
  const last = Math.min(ORDER.length, MOST_ROWS) - 1;
  const place = STATE.latent === null ? undefined : PLACE.get(ROW_OF.get(STATE.latent));
  const to = place === undefined ? (by > 0 ? 0 : last) : Math.max(0, Math.min(last, place + by));
  show(LATENTS.latent[ORDER[to]]);
}

// ---- the latent that is read ----------------------------------------------------------------------------------------

let VIEW = "";  // how its examples are set
const VIEWS = { aligned: "Aligned", flowing: "Flowing", lines: "Lines" };

function show(latent, { push = false, focus = false } = {}) {
  lastRead = latent ?? STATE.latent;
  STATE.latent = latent;
  remember(push);
  reveal();
  markPicked();
  drawPanel();
  if (focus) byId("panel").focus({ preventScroll: true });
}

let drawing = 0;
async function drawPanel() {
  const turn = ++drawing, row = ROW_OF.get(STATE.latent);
  document.body.dataset.shown = STATE.latent === null ? "list" : "latent";
  document.title = `${STATE.latent === null ? "" : `Latent ${STATE.latent} · `}${DATA.title} · Penstock features`;
  hideTip();
  if (STATE.latent === null) {
    byId("list").scrollTop = listTop;
    return setPanel("Overview", overview());
  }
  byId("panel").ariaBusy = "true";
  try {
    const chunk = await chunkOf(row);
    if (turn === drawing) setPanel(`Latent ${STATE.latent}`, latentCard(row, chunk));
  } catch (error) {
    if (turn !== drawing) return;
    const again = element("button", { type: "button", className: "quiet" }, "Try again");
    again.addEventListener("click", drawPanel);
    setPanel(`Latent ${STATE.latent}`, [panelHead(row), element("p", { className: "trouble" },
      `Its examples cannot be read: ${error.message}.${DATA.served ? " Is `penstock features --serve` still running?" : ""}`), again]);
  }
}

function setPanel(name, content) {
  const panel = byId("panel");
  panel.ariaBusy = "false";
  panel.replaceChildren(...content);
  panel.scrollTop = 0;
  panel.ariaLabel = name;
  if (narrow() && STATE.latent !== null) scrollTo(0, 0);
}

function panelHead(row) {
  const latent = LATENTS.latent[row];
  const back = element("button", { type: "button", className: "quiet back", ariaLabel: "Back to the list of latents" }, "←");
  back.addEventListener("click", leave);
  const [before, after] = [["‹", "Previous latent of the list", -1], ["›", "Next latent of the list", 1]].map(([shape, name, by]) => {
    const made = element("button", { type: "button", className: "quiet", ariaLabel: name, title: name }, shape);
    made.addEventListener("click", () => step(by));
    return made;
  });
  const link = element("button", { type: "button", className: "quiet" }, "Copy link");
  link.addEventListener("click", async () => {
    const holder = element("pre", { className: "unseen" }, location.href);
    document.body.append(holder);
    const done = await copied(location.href, holder);
    holder.remove();
    link.textContent = done ? "Copied" : "Not copied";
    say(done ? "Copied the link to this latent" : "The link could not be copied; it is in the address bar");
    setTimeout(() => { link.textContent = "Copy link"; }, 1600);
  });
  const there = DATA.neuronpedia && element("a", { className: "quiet", target: "_blank", rel: "noopener noreferrer",
    href: `https://www.neuronpedia.org/${DATA.neuronpedia}/${latent}` }, "Neuronpedia ↗");
  const whole = element("button", { type: "button", className: "quiet whole" }, "Overview");
  whole.addEventListener("click", () => show(null, { push: true }));
  return element("div", { className: "panel-head" }, back, element("h2", {}, `Latent ${latent}`),
    element("div", { className: "actions" }, there || null, whole, link, before, after));
}

function leave() {  // to the list, and where in it one was
  show(null, { push: true });
  byId("list").scrollTop = listTop;
  reveal(lastRead);
  byId("list").focus({ preventScroll: true });
}

function pair(name, value, about = "") {
  return element("div", about ? { title: about } : {}, element("dt", {}, name), element("dd", {}, value));
}

function latentCard(row, chunk) {
  const within = row % DATA.chunk, fired = LATENTS.fired[row], tokens = DATA.data.tokens;
  const facts = element("dl", { className: "keys" },
    pair("Fires on", [percent(LATENTS.firing_rate[row]), element("small", {}, `${short(fired)}${tokens ? ` of ${short(tokens)}` : ""} tokens`)]),
    ...(fired ? [
      pair("Max activation", figure(LATENTS.max_activation[row])),
      pair("Mean where it fires", figure(LATENTS.mean_activation[row])),
      pair("Peak tokens agree", [percent(LATENTS.agreement[row]), element("small", {}, ["on ", spoken(commonPeak(row))])],
        "Share of the top examples whose peak is the commonest peak token"),
    ] : []));
  return [panelHead(row), facts, element("div", { className: "card-parts" },
    element("div", { className: "sides" },
      logitTable("Promoted tokens", "top", row, within, chunk),
      logitTable("Suppressed tokens", "bottom", row, within, chunk),
      element("section", {}, fired ? histogram(row, within, chunk) : element("p", { className: "soft" }, "It never fired on these tokens."),
        neighbours(within, chunk))),
    ...(fired ? examples(row, within, chunk) : []), steering(row, within, chunk))];
}

function commonPeak(row) {
  const seen = new Map();
  for (let example = LATENTS.nearStarts[row]; example < LATENTS.nearStarts[row + 1]; example++)
    seen.set(peakToken(example), (seen.get(peakToken(example)) ?? 0) + 1);
  return [...seen].sort((a, b) => b[1] - a[1])[0]?.[0] ?? 0;
}

function logits(side, row, within, chunk) {
  const offsets = side === "top" ? LATENTS.topStarts : LATENTS.bottomStarts, first = offsets[row - within];
  return [LATENTS[`${side}_tokens`].subarray(offsets[row], offsets[row + 1]),
    chunk[`${side}_logits`].subarray(offsets[row] - first, offsets[row + 1] - first)];
}

function logitTable(title, side, row, within, chunk) {
  const [tokens, values] = logits(side, row, within, chunk);
  const most = Math.max(...["top", "bottom"].flatMap(one => [...logits(one, row, within, chunk)[1]]).map(Math.abs), 1e-9);
  const lines = [...tokens].map((token, i) => {
    const bar = element("span", { className: "logit-bar" });
    bar.style.width = `${Math.abs(values[i]) / most * 100}%`;
    return element("tr", {}, element("th", { scope: "row", title: quoted(token) }, spoken(token)),
      element("td", {}, element("span", { className: `logit ${side}`, ariaHidden: "true" }, bar)),
      element("td", { className: "number" }, signed(values[i])));
  });
  const name = `${side}-title`;
  return element("section", { "aria-labelledby": name }, element("h3", { id: name }, title),
    lines.length ? element("table", { className: "logits", "aria-labelledby": name }, element("tbody", {}, lines))
      : element("p", { className: "soft" }, "Not kept."));
}

const signed = value => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

function histogram(row, within, chunk) {
  const bins = DATA.bins, size = bins.length - 1, counts = chunk.histogram.subarray(within * size, (within + 1) * size);
  let last = size;
  while (last > 1 && !counts[last - 1]) last--;
  let first = 0;
  while (first < last - 1 && !counts[first]) first++;
  const most = Math.max(...counts), width = 300, height = 84, each = width / (last - first);
  const tall = count => count ? Math.max(2, height * Math.log1p(count) / Math.log1p(most)) : 0;
  const bars = [];
  for (let bin = first; bin < last; bin++)
    bars.push(drawn("rect", { x: (bin - first) * each + 0.5, width: Math.max(1, each - 1), y: height - tall(counts[bin]), height: tall(counts[bin]) },
      drawn("title", {}, `${number(counts[bin])} tokens from ${figure(bins[bin])} to ${figure(bins[bin + 1])}`)));
  return element("figure", { className: "histogram" }, element("figcaption", { id: "histogram-title" }, element("h3", {}, "Activations"),
    element("span", { className: "soft" }, "tokens; both axes log")),
    drawn("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Histogram of activations from ${figure(bins[first])} to ${figure(bins[last])}; the fullest bin has ${number(most)} tokens` }, bars),
    element("p", { className: "ends soft" }, element("span", {}, figure(bins[first])), element("span", {}, figure(bins[last]))));
}

function neighbours(within, chunk) {
  const from = chunk.neighbourStarts[within], to = chunk.neighbourStarts[within + 1];
  if (from === to) return null;
  const links = [];
  for (let i = from; i < to; i++) {
    const latent = chunk.neighbours[i], row = ROW_OF.get(latent);
    const made = element("button", { type: "button", className: "neighbour", ariaLabel: `Latent ${latent}, cosine ${chunk.neighbour_cosines[i].toFixed(2)}` },
      element("b", {}, String(latent)), element("span", { className: "snippet" }, row === undefined ? "" : snippet(row, -1, 2)),
      element("span", { className: "soft" }, chunk.neighbour_cosines[i].toFixed(2)));
    if (row === undefined) made.disabled = true;
    else made.addEventListener("click", () => show(latent, { push: true, focus: true }));
    links.push(element("li", {}, made));
  }
  return [element("h3", { id: "neighbours-title", title: "By the cosine of their decoder directions" }, "Nearest latents"),
    element("ul", { className: "neighbours", "aria-labelledby": "neighbours-title" }, links)];
}

// What stands ahead of the peak in its strongest example: a text in which the model was about to use it.
function promptOf(within, chunk) {
  let strongest = chunk.exampleStarts[within];
  const end = chunk.exampleStarts[within + 1];
  while (strongest < end && chunk.group[strongest] !== 0) strongest++;
  if (strongest === end) return "a prompt";
  const begin = chunk.tokenStarts[strongest];
  const before = Array.from({ length: chunk.peak[strongest] }, (_, i) => TEXTS[chunk.tokens[begin + i]]).join("");
  return [...before.replace(/<[|].*?[|]>|\uFFFD/g, "")].slice(-60).join("") || "a prompt";
}

function steering(row, within, chunk) {
  const strength = +LATENTS.max_activation[row].toPrecision(3) || 1, { folder, sweep, id } = DATA.sae;
  const path = folder || (id ? `sae-${String(id).replace(/[^\w.-]+/g, "-").replace(/-$/, "")}` : "sae");
  const pulled = !folder && sweep && id ? `# penstock pull ${sweep} --sae ${id} --to ${path}\n` : "";
  const code = `${pulled}import penstock\nfrom sae_core import SAE\nfrom sae_core.analysis import Add, steer\n\n`
    + `sae = SAE.load(${JSON.stringify(path)})\nmodel = penstock.load_model(sae=sae)\n`
    + `print(steer(model, sae, ${JSON.stringify(promptOf(within, chunk))}, [Add(${LATENTS.latent[row]}, ${strength})], max_new_tokens=40).side_by_side())`;
  return element("section", { "aria-labelledby": "steer-title" }, element("h3", { id: "steer-title" }, "Steer with it"),
    copyable(code, "the code that steers with this latent"));
}

// ---- examples -------------------------------------------------------------------------------------------------------

function examples(row, within, chunk) {
  const groups = new Map();
  for (let example = chunk.exampleStarts[within]; example < chunk.exampleStarts[within + 1]; example++) {
    const group = chunk.group[example];
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(example);
  }
  const quantiles = Number(DATA.settings.quantiles);
  const sections = [...groups].sort(([a], [b]) => (a === 0 ? Infinity : a) > (b === 0 ? Infinity : b) ? -1 : 1).map(([group, members]) => {
    const values = members.map(example => chunk.activation[example]);
    const range = `${figure(Math.min(...values))} to ${figure(Math.max(...values))}`;
    const title = group === 0 ? "Top examples" : group === quantiles ? `Strongest ${part(quantiles)} of its firings` : group === 1
      ? `Weakest ${part(quantiles)} of its firings` : `${nth(group)} ${part(quantiles)} of its firings`;
    const id = `group-${group}`;
    return element("section", { className: "group", "aria-labelledby": id },
      element("h3", { id }, title, element("small", {}, `activation ${range}`)),
      element("ul", { className: "examples" }, members.map((example, i) => exampleLine(row, chunk, example, group === 0 && i === 0))));
  });
  if (!sections.length) return [element("p", { className: "soft" }, "This page holds none of its examples.")];
  const views = element("div", { className: "views", role: "radiogroup", ariaLabel: "How the examples are set" },
    Object.entries(VIEWS).map(([name, label]) => {
      const input = element("input", { type: "radio", name: "view", value: name, checked: name === VIEW });
      input.addEventListener("change", () => setView(name, true));
      return element("label", {}, input, element("span", {}, label));
    }));
  sections[0].prepend(views);
  return [element("div", { className: "all-examples" }, sections,
    DATA.kept ? element("p", { className: "soft" }, keptSentence()) : null)];
}

const part = count => ({ 2: "half", 3: "third", 4: "quarter", 5: "fifth", 10: "tenth" })[count] ?? `1/${count}`;
const nth = count => ({ 2: "Second", 3: "Third", 4: "Fourth" })[count] ?? `${count}th`;
const keptSentence = () => `To stay small this page keeps ${DATA.kept.top} of ${DATA.settings.top} top examples and ${DATA.kept.each} of `
  + `${DATA.settings.per_quantile} of each quantile; penstock features --serve shows them all.`;

function exampleLine(row, chunk, example, first) {
  const most = LATENTS.max_activation[row], begin = chunk.tokenStarts[example], count = chunk.lengths[example], peak = chunk.peak[example];
  const spans = [];
  for (let i = 0; i < count; i++) {
    const value = i === peak ? chunk.activation[example] : chunk.activations[begin + i] * most / 255;
    const made = tokenSpan(chunk.tokens[begin + i], heat(value, most), i === peak, VIEW === "lines");
    made.dataset.value = value;
    spans.push(made);
  }
  const whole = spans.map(one => TEXTS[one.dataset.token]).join("");
  const turned = (whole.match(RIGHT_TO_LEFT)?.length ?? 0) * 2 > (whole.match(LETTERS)?.length ?? 0);
  const line = element("li", { className: "example", tabIndex: first ? 0 : -1 },
    element("span", { className: "value", title: `row ${chunk.row[example]}, position ${chunk.position[example]}` }, even(chunk.activation[example])),
    element("div", { className: "window", dir: turned ? "rtl" : "ltr" },
      element("span", { className: "before" }, element("span", {}, spans.slice(0, peak))), element("span", { className: "after" }, spans.slice(peak))));
  line.dataset.place = `row ${number(chunk.row[example])}, position ${chunk.position[example]}`;
  return line;
}

function setView(name, redraw) {
  VIEW = Object.hasOwn(VIEWS, name ?? "") ? name : narrow() ? "flowing" : "aligned";
  byId("panel").dataset.view = VIEW;
  if (!redraw) return;
  try {
    localStorage.setItem("penstock-examples", name);
  } catch {}
  const top = byId("panel").scrollTop;
  drawPanel().then(() => {
    byId("panel").scrollTop = top;
    document.querySelector(`.views input[value=${VIEW}]`)?.focus({ preventScroll: true });
  });
}

function aboutToken(span) {
  const value = Number(span.dataset.value);
  return [element("b", { className: "mono" }, shapes(quoted(span.dataset.token))),
    element("table", {}, element("tbody", {}, element("tr", {}, element("td", { className: "soft" }, span.tagName === "MARK" ? "Activation, the peak" : "Activation"),
      element("td", {}, value ? text(+value.toPrecision(span.tagName === "MARK" ? 4 : 2)) : "0")))),
    element("p", {}, span.closest(".example").dataset.place)];
}

/** What the keyboard gets instead: all tokens of an example that fire. */
function aboutExample(line) {
  const firing = [...line.querySelectorAll(".t")].filter(span => Number(span.dataset.value));
  return [element("b", {}, "Tokens that fire"), element("table", {}, element("tbody", {}, firing.map(span => element("tr", {},
    element("td", { className: "mono" }, shapes(quoted(span.dataset.token))), element("td", {}, text(+Number(span.dataset.value).toPrecision(span.tagName === "MARK" ? 4 : 2))))))),
    element("p", {}, line.dataset.place)];
}

// ---- the SAE as a whole ---------------------------------------------------------------------------------------------

function overview() {
  const { sae, metadata, data, figures } = DATA, alive = LATENTS.fired.reduce((sum, fired) => sum + (fired > 0), 0);
  const count = LATENTS.latent.length;
  const facts = [["Latents", number(count)], ["Never fired", `${number(count - alive)} (${percent((count - alive) / count)})`],
    ["Active a token (L0)", typeof figures.l0 === "number" ? figure(figures.l0) : null],
    ["Explained variance", typeof figures.explained_variance === "number" ? figures.explained_variance.toFixed(3) : null]];
  const about = [["Model", metadata.model_name], ["Reads", metadata.hook_name], ["Writes", metadata.hook_name_out],
    ["Architecture", sae.architecture], ["SAE", sae.id], ["Sweep", sae.sweep], ["Folder", sae.folder],
    ["Looked at", data.tokens ? `${number(data.tokens)} tokens of ${data.dataset ?? "the dataset"}${data.split ? `, ${data.split} split` : ""}` : null],
    ["Context", data.context_size ? `${data.context_size} tokens` : null], ["Penstock", DATA.version]];
  const term = (name, meaning) => [element("dt", {}, element("kbd", {}, name)), element("dd", {}, meaning)];
  return [element("div", { className: "panel-head" }, element("h2", {}, "Overview")),
    element("dl", { className: "keys" }, facts.filter(([, value]) => value !== null).map(([name, value]) => pair(name, value))),
    alive ? rates() : null,
    element("section", { "aria-labelledby": "how-title" }, element("h3", { id: "how-title" }, "How to find a latent"),
      element("dl", { className: "pairs how" },
        term("return", "latents that fire on or near that text, or promote such a token"), term("\" return\"", "a whole token, its spaces and case as they are"),
        term("\\n", "a newline; \\t is a tab"), term("512", "that latent"),
        element("dt", {}, "Keys"), element("dd", {}, ["/ j k Enter Esc".split(" ").map(one => [element("kbd", {}, one), " "]), "search, next, previous, read, back"].flat(2)))),
    element("section", { "aria-labelledby": "about-title" }, element("h3", { id: "about-title" }, "About this SAE"),
      element("dl", { className: "pairs" }, about.filter(([, value]) => value !== null && value !== undefined && value !== "")
        .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]))),
    DATA.kept ? element("p", { className: "soft" }, keptSentence()) : null].filter(Boolean);
}

/** How often latents fire: a bar for each quarter of a decade. */
function rates() {
  const logs = [...LATENTS.firing_rate].filter(rate => rate > 0).map(Math.log10);
  const first = Math.floor(logs.reduce((a, b) => Math.min(a, b), 0)), bins = new Uint32Array(-4 * first || 4);
  for (const log of logs) bins[Math.min(bins.length - 1, Math.floor((log - first) * 4))]++;
  const width = 600, height = 110, most = Math.max(...bins), each = width / bins.length;
  const bars = [...bins].map((count, i) => drawn("rect", { x: i * each + 0.5, width: each - 1, y: height - (count ? Math.max(2, height * count / most) : 0), height: count ? Math.max(2, height * count / most) : 0 },
    drawn("title", {}, `${number(count)} latents fire on ${percent(10 ** (first + i / 4))} to ${percent(10 ** (first + (i + 1) / 4))} of the tokens`)));
  const ticks = [];
  for (let decade = first; decade <= 0; decade++) {
    ticks.push(element("span", {}, percent(10 ** decade)));
    ticks.at(-1).style.left = `${100 * (decade - first) / -(first || -1)}%`;
  }
  return element("figure", { className: "histogram wide" }, element("figcaption", {}, element("h3", {}, "How often its latents fire"),
    element("span", { className: "soft" }, `latents, the fullest bar ${number(most)}`)),
    drawn("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `Histogram of firing rates from ${percent(10 ** first)} to 100%` }, bars),
    element("p", { className: "ticks soft" }, ticks));
}

// ---- what the reader does -------------------------------------------------------------------------------------------

function ask(change) {
  Object.assign(STATE, change);
  byId("list").scrollTop = 0;
  arrange();
  remember();
}

function options(id, among) {
  byId(id).append(...Object.entries(among).map(([value, label]) => element("option", { value }, label)));
}

function listen() {
  byId("find").addEventListener("submit", event => event.preventDefault());
  const searched = () => { if (byId("search").value !== STATE.words) ask({ words: byId("search").value }); };
  let waiting = 0;
  byId("search").addEventListener("input", () => {  // where it takes a while, once the typing rests
    clearTimeout(waiting);
    if (LATENTS.latent.length > 50_000) waiting = setTimeout(searched, 150);
    else searched();
  });
  byId("search").addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === "ArrowDown" || event.key === "Escape") searched();
    if (event.key === "Escape" && STATE.words) {
      event.preventDefault();
      ask({ words: "" });
    } else if (event.key === "Escape") byId("list").focus();
    else if ((event.key === "Enter" || event.key === "ArrowDown") && ORDER.length) {
      event.preventDefault();
      byId("list").focus({ preventScroll: true });
      if (event.key === "Enter" || STATE.latent === null || !PLACE.has(ROW_OF.get(STATE.latent)))
        show(LATENTS.latent[ORDER[0]], { push: true, focus: narrow() });
    }
  });
  byId("where").addEventListener("change", event => ask({ where: event.target.value }));
  byId("show").addEventListener("change", event => ask({ show: event.target.value }));
  byId("sort").addEventListener("change", event => ask({ sort: event.target.value, turned: false }));
  byId("direction").addEventListener("click", () => ask({ turned: !STATE.turned, sort: sortedBy() }));
  const list = byId("list");
  list.addEventListener("scroll", () => {
    if (list.clientHeight) listTop = list.scrollTop;
    drawRows();
  }, { passive: true });
  list.addEventListener("click", event => {
    const made = event.target.closest(".option");
    if (made) show(LATENTS.latent[made.dataset.row], { push: true, focus: narrow() });
  });
  list.addEventListener("keydown", event => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (by !== undefined) {
      event.preventDefault();
      if (Math.abs(by) === Infinity && ORDER.length) show(LATENTS.latent[ORDER[by < 0 ? 0 : Math.min(ORDER.length, MOST_ROWS) - 1]]);
      else step(by);
    } else if (event.key === "Enter") {
      event.preventDefault();
      if (STATE.latent === null) step(1);
      byId("panel").focus({ preventScroll: true });
    }
  });
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.key === "Escape") {
      hideTip();
      if (byId("panel").contains(document.activeElement)) {
        if (narrow()) leave();
        else byId("list").focus({ preventScroll: true });
      }
    }
    if (event.target.closest?.("input, select, textarea") && event.target.type !== "radio") return;
    if (event.key === "/") {
      event.preventDefault();
      if (narrow() && STATE.latent !== null) show(null);
      byId("search").focus();
      byId("search").select();
    } else if (event.key === "j" || event.key === "k") step(event.key === "j" ? 1 : -1);
  });
  const panel = byId("panel");
  for (const kind of ["pointerover", "click"])
    panel.addEventListener(kind, event => {
      const span = event.target.closest(".example .t");
      if (!span) return hideTip();
      const box = span.getBoundingClientRect();
      showTip(aboutToken(span), box.right, box.top + box.height / 2);
    });
  panel.addEventListener("pointerleave", hideTip);
  panel.addEventListener("focusin", event => {
    const line = event.target.matches(".example:focus-visible") ? event.target : null;
    if (!line) return hideTip();
    const box = line.querySelector("mark")?.getBoundingClientRect() ?? line.getBoundingClientRect();
    showTip(aboutExample(line), box.right, box.bottom);
  });
  panel.addEventListener("keydown", event => {
    if (!event.target.matches(".example") || !["ArrowDown", "ArrowUp"].includes(event.key)) return;
    const lines = [...panel.querySelectorAll(".example")], to = lines[lines.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)];
    event.preventDefault();
    if (!to) return;
    event.target.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
  addEventListener("scroll", hideTip, { passive: true, capture: true });
  byId("home").addEventListener("click", event => {
    event.preventDefault();
    show(null, { push: STATE.latent !== null });
  });
  byId("skip").addEventListener("click", event => { event.preventDefault(); byId("panel").focus(); });
  addEventListener("popstate", restore);
  addEventListener("resize", drawRows);
}

function restore() {
  recall();
  arrange();
  reveal();
  drawPanel();
}

async function start() {
  setTheme(stored() ?? "auto");
  const { sae, metadata, data, figures } = DATA;
  byId("facts").append(...[metadata.model_name, sae.architecture, `${text(sae.d_sae, 0)} latents`,
    typeof figures.l0 === "number" ? `L0 ${figure(figures.l0)}` : null, data.tokens ? `over ${short(data.tokens)} tokens` : null]
    .filter(Boolean).map(fact => element("li", {}, String(fact))));
  try {
    await readIndex();
  } catch (error) {
    byId("state").textContent = `This browser cannot read the page's data: ${error.message}.`;
    return;
  }
  options("where", PLACES);
  options("show", SHOWN);
  let kept = null;
  try {
    kept = localStorage.getItem("penstock-examples");
  } catch {}
  setView(kept);
  byId("state").remove();
  byId("browser").hidden = false;
  listen();
  restore();
  document.body.dataset.ready = "yes";
  (globalThis.requestIdleCallback ?? setTimeout)(near);
}

start();
