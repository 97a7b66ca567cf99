"use strict";
// The sheet's page: one clip at a time, every answer kept in this browser, a CSV at the end. The page is complete in
// itself; all that it knows is in the elements of sheet.html.

const find = (selector, inside = document) => inside.querySelector(selector);
const findAll = (selector, inside = document) => [...inside.querySelectorAll(selector)];

const sheet = find("#sheet").dataset.sheet;
const store = "drive-vlm " + sheet;
const clips = findAll("section.clip");
const questions = findAll("fieldset");
const marksOf = new Map(questions.map((question) => [question, []]));  // the words of the answer that it asks about
for (const mark of findAll("mark")) {
  for (const id of mark.dataset.questions.split(" ")) marksOf.get(document.getElementById(id)).push(mark);
}
let state = { rater: "", clip: 0, answers: {} };  // answers: {question's id: the value chosen}

// ---- what is kept ---------------------------------------------------------------------------------------------------

const NOT_KEPT = "This browser keeps nothing: do not reload before you have downloaded your ratings.";

function keep() {
  try {
    localStorage.setItem(store, JSON.stringify(state));
  } catch {
    say(NOT_KEPT);
  }
}

function restore() {
  try {
    state = { ...state, ...JSON.parse(localStorage.getItem(store)) };
  } catch {
    say(NOT_KEPT);
  }
  find("#rater").value = state.rater;
  for (const question of questions) {
    for (const choice of findAll("input", question)) choice.checked = choice.value === state.answers[question.id];
  }
  openClip(Math.min(state.clip, clips.length - 1));
}

function say(text) {
  find("#message").textContent = text;
}

// ---- answers and progress -------------------------------------------------------------------------------------------

const isOpen = (question) => !(question.id in state.answers);

function answer(question, value) {
  find(`input[value="${value}"]`, question).checked = true;
  state.answers[question.id] = value;
  keep();
  showProgress();
}

// The same mark for this mention and for all mentions of its object in the clip that have none yet.
function answerAll(question, value) {
  const alike = findAll("fieldset", question.closest("section")).filter(
    (other) => other.dataset.object === question.dataset.object && isOpen(other));
  for (const other of [question, ...alike]) answer(other, value);
}

function showProgress() {
  const open = questions.filter(isOpen);
  find("#bar").value = questions.length - open.length;
  find("#count").textContent = `${questions.length - open.length} of ${questions.length} answered`;
  for (const question of questions) {
    for (const mark of marksOf.get(question)) mark.classList.toggle("done", !isOpen(question));
  }
  clips.forEach((clip, number) => {
    const button = findAll("#clips button")[number];
    button.classList.toggle("done", !findAll("fieldset", clip).some(isOpen));
    if (number === state.clip) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
}

function openClip(number) {
  state.clip = number;
  clips.forEach((clip, other) => { clip.hidden = other !== number; });
  findAll("#clips button")[number].scrollIntoView({ block: "nearest", inline: "nearest" });
  stop();
  showFrame(clips[number], 0);
  showProgress();
  keep();
}

function turn(step) {
  const number = state.clip + step;
  if (number < 0 || number >= clips.length) return;
  openClip(number);
  clips[number].scrollIntoView();
}

// ---- frames ---------------------------------------------------------------------------------------------------------

let timer = null;
let shown = 0;

function showFrame(clip, number) {
  const frames = findAll(".thumbs button", clip);
  shown = (number + frames.length) % frames.length;
  frames.forEach((frame, other) => frame.classList.toggle("on", other === shown));
  const picture = find("img", frames[shown]);
  for (const large of [find(".large img", clip), find("#enlarged img")]) {
    large.src = picture.src;
    large.alt = picture.alt;
  }
  find(".when", clip).textContent = `frame ${shown + 1} of ${frames.length}, ${picture.alt}`;
}

function play() {
  if (timer) return stop();
  timer = setInterval(() => showFrame(clips[state.clip], shown + 1), 500);
  find(".play", clips[state.clip]).textContent = "Pause";
}

function stop() {
  clearInterval(timer);
  timer = null;
  for (const button of findAll(".play")) button.textContent = "Play";
}

function step(by) {
  stop();
  showFrame(clips[state.clip], shown + by);
}

// ---- the CSV --------------------------------------------------------------------------------------------------------

function csv() {
  const rows = [["sheet", "rater", "item", "mention", "answer"]];
  for (const question of questions.filter((question) => !isOpen(question))) {
    rows.push([sheet, state.rater, question.dataset.item, question.dataset.mention, state.answers[question.id]]);
  }
  const quoted = (text) => '"' + text.replaceAll('"', '""') + '"';
  return rows.map((row) => row.map(quoted).join(",") + "\r\n").join("");
}

function download() {
  if (!state.rater) {
    say("Write your name first: it tells your ratings from those of others.");
    find("#rater").focus();
    return;
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = `ratings_${state.rater.replace(/[^\p{L}\p{N}]+/gu, "_")}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  const open = questions.filter(isOpen).length;
  say(open ? `Downloaded with ${open} questions open. You can go on and download again.` : "Downloaded. Thank you.");
}

function startOver() {
  if (!confirm("Delete all answers that this browser keeps of this sheet?")) return;
  state = { rater: "", clip: 0, answers: {} };
  keep();
  restore();
  say("");
}

// ---- mouse, touch and keyboard --------------------------------------------------------------------------------------

function focusOn(question) {
  (find("input:checked", question) || find("input", question)).focus();
}

// To the next open question of the clip, else to its end.
function goOn(question) {
  const inClip = findAll("fieldset", clips[state.clip]);
  const later = inClip.slice(inClip.indexOf(question) + 1);
  const next = [...later, ...inClip].find(isOpen);
  if (next) focusOn(next);
  else find(".next", clips[state.clip]).focus();
}

const PREFERENCES = { a: "A", b: "B", s: "same" };
const MARKS = { 1: "there", 2: "not there", 3: "cannot tell" };

function onKey(event) {
  if (event.target.id === "rater" || event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.toLowerCase();
  const inClip = findAll("fieldset", clips[state.clip]);
  const question = event.target.closest("fieldset") || inClip.find(isOpen) || inClip[0];
  const digit = /^(?:Digit|Numpad)([123])$/.exec(event.code);
  if (key in PREFERENCES && !question.dataset.mention) {
    answer(question, PREFERENCES[key]);
    goOn(question);
  } else if (digit && question.dataset.mention) {
    (event.shiftKey ? answerAll : answer)(question, MARKS[digit[1]]);
    goOn(question);
  } else if (key === "j" || key === "k") {
    const at = inClip.indexOf(question) + (!event.target.closest("fieldset") ? 0 : key === "j" ? 1 : -1);
    if (inClip[at]) focusOn(inClip[at]);
  } else if (key === "n") turn(1);
  else if (key === "p") turn(-1);
  else if (key === ",") step(-1);
  else if (key === ".") step(1);
  else if (key === "l") play();
  else if (key === "e") enlarge();
  else return;
  event.preventDefault();
}

function enlarge() {
  const dialog = find("#enlarged");
  if (dialog.open) dialog.close();
  else dialog.showModal();
}

function listen() {
  document.addEventListener("keydown", onKey);
  find("#rater").addEventListener("input", (event) => {
    state.rater = event.target.value.trim();
    keep();
  });
  find("#download").addEventListener("click", download);
  find("#start_over").addEventListener("click", startOver);
  find("#enlarged").addEventListener("click", enlarge);
  findAll("#clips button").forEach((button, number) => button.addEventListener("click", () => turn(number - state.clip)));
  for (const clip of clips) {
    find(".large", clip).addEventListener("click", enlarge);
    find(".play", clip).addEventListener("click", play);
    find(".previous", clip).addEventListener("click", () => turn(-1));
    find(".next", clip).addEventListener("click", () => turn(1));
    findAll(".thumbs button", clip).forEach((button, number) => button.addEventListener("click", () => step(number - shown)));
  }
  for (const question of questions) {
    question.addEventListener("change", (event) => answer(question, event.target.value));
    for (const [name, on] of [["focusin", true], ["focusout", false], ["mouseenter", true], ["mouseleave", false]]) {
      question.addEventListener(name, () => marksOf.get(question).forEach((mark) => mark.classList.toggle("on", on)));
    }
    for (const mark of marksOf.get(question)) mark.addEventListener("click", () => focusOn(question));
  }
}

listen();
restore();
