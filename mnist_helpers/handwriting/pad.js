// The browser's half of the drawing pad. The ink lives here and flows whatever the kernel does;
// the kernel is sent small grey pictures, one at a time, and answers with ten probabilities.

const SIDE = 56; // the pad in its own units, and the pixels of the picture that is sent
const PEN = 4.6; // width of a line in these units: as thick as MNIST's digits are
const PATIENCE = 3000; // milliseconds without an answer until the reader is told
const HINT = "Draw a digit with mouse, pen or finger.";
const GONE = "No answer for 3 s: the kernel is busy or gone. If it was restarted, run this cell again.";
const SVG = "http://www.w3.org/2000/svg";

const DIGITS = [...Array(10).keys()];
const PAGE = `
  <div class="mnist-pad" role="group" aria-label="Drawing pad" data-lm-suppress-shortcuts="true">
    <svg class="paper" viewBox="0 0 ${SIDE} ${SIDE}" tabindex="0" role="img" aria-label="Paper to draw on"></svg>
    <div class="result">
      <figure><canvas class="seen" width="28" height="28" role="img"
        aria-label="The 28 by 28 pixels that the model sees"></canvas><figcaption>what the model sees</figcaption></figure>
      <output class="answer" aria-live="polite"><b>?</b><span></span></output>
    </div>
    <div class="bars" aria-hidden="true">
      ${DIGITS.map((digit) => `<div class="bar"><b>${digit}</b><i><u></u></i><span></span></div>`).join("")}
    </div>
    <div class="buttons">
      <button type="button" class="clear" title="Delete key" aria-keyshortcuts="Delete">Clear</button>
      <button type="button" class="undo" title="Ctrl+Z" aria-keyshortcuts="Control+Z">Undo</button>
      <span class="status" role="status">${HINT}</span>
    </div>
  </div>`;

function render({ model, el }) {
  el.innerHTML = PAGE;
  const [pad, paper, seen, answer, status] = [".mnist-pad", ".paper", ".seen", ".answer", ".status"].map(
    (name) => el.querySelector(name),
  );
  const bars = [...el.querySelectorAll(".bar")];
  const small = document.createElement("canvas");
  small.width = small.height = SIDE;
  const ink = small.getContext("2d", { willReadFrequently: true });

  // ---- drawing: every stroke is one <path>, so that undo is removing the last one
  let stroke = null; // the path under the pen

  function place(event) {
    const box = paper.getBoundingClientRect();
    const scale = SIDE / box.width;
    return `${((event.clientX - box.left) * scale).toFixed(2)} ${((event.clientY - box.top) * scale).toFixed(2)}`;
  }

  function penDown(event) {
    if (!event.isPrimary || event.button !== 0) return;
    event.preventDefault(); // no selected text, no dragged picture
    paper.focus({ preventScroll: true }); // so that the keys work after drawing
    paper.setPointerCapture(event.pointerId); // a line may leave the paper and come back
    stroke = document.createElementNS(SVG, "path");
    stroke.setAttribute("stroke-width", PEN);
    stroke.setAttribute("d", `M${place(event)} l0.01 0`); // a tap leaves a dot
    paper.append(stroke);
    answer.ariaBusy = "true"; // a screen reader waits for the end of the stroke
    changed();
  }

  function penMove(event) {
    if (!stroke) return;
    const events = event.getCoalescedEvents?.() ?? [];
    const line = (events.length ? events : [event]).map((point) => `L${place(point)}`).join("");
    stroke.setAttribute("d", stroke.getAttribute("d") + line);
    changed();
  }

  function penUp() {
    if (!stroke) return;
    stroke = null;
    answer.ariaBusy = "false";
    changed(true);
  }

  function undo() {
    stroke = null;
    paper.lastElementChild?.remove();
    changed(true);
  }

  function clear() {
    stroke = null;
    paper.replaceChildren();
    changed();
  }

  function pressKey(event) {
    const key = event.key.toLowerCase();
    if (key === "z" && (event.ctrlKey || event.metaKey)) undo();
    else if (key === "delete" || key === "backspace") clear();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // ---- asking the kernel: never more than one question waits for its answer
  let sequence = 0; // number of the latest question
  let waiting = null; // the timer of a question without an answer yet
  let dirty = false; // the drawing has changed since the latest question
  let finished = false; // a stroke has ended since then: the kernel keeps that picture

  function changed(strokeEnded = false) {
    dirty = true;
    finished ||= strokeEnded;
    if (!paper.children.length) {
      showNothing();
      dirty = finished = false;
    } else if (waiting === null) ask();
  }

  function ask() {
    model.send({ sequence: ++sequence, finished }, undefined, [takePicture().buffer]);
    dirty = finished = false;
    waiting = setTimeout(() => say(GONE, true), PATIENCE);
  }

  function takePicture() {
    ink.clearRect(0, 0, SIDE, SIDE);
    ink.lineWidth = PEN;
    ink.lineCap = ink.lineJoin = "round";
    for (const path of paper.children) ink.stroke(new Path2D(path.getAttribute("d")));
    const { data } = ink.getImageData(0, 0, SIDE, SIDE);
    return Uint8Array.from({ length: SIDE * SIDE }, (_, pixel) => data[4 * pixel + 3]); // how much ink
  }

  function receive(message, buffers) {
    if (message.sequence !== sequence) return; // the answer to another view of this pad
    clearTimeout(waiting);
    waiting = null;
    if (!paper.children.length) return showNothing(); // cleared in the meantime
    if (message.problem) showNothing(message.problem);
    else showAnswer(message, buffers[0]);
    if (dirty) ask();
  }

  // ---- showing
  function showAnswer({ sequence, probabilities }, pixels) {
    const best = probabilities.indexOf(Math.max(...probabilities));
    bars.forEach((bar, digit) => setBar(bar, probabilities[digit], digit === best));
    answer.firstChild.textContent = best;
    answer.lastChild.textContent = `${percent(probabilities[best])} sure`;
    const picture = new ImageData(28, 28);
    for (let pixel = 0; pixel < 28 * 28; pixel++)
      picture.data.set([...Array(3).fill(pixels.getUint8(pixel)), 255], 4 * pixel);
    seen.getContext("2d").putImageData(picture, 0, 0);
    pad.dataset.answered = sequence;
    say("");
  }

  function showNothing(problem = "") {
    bars.forEach((bar) => setBar(bar, 0, false));
    answer.firstChild.textContent = "?";
    answer.lastChild.textContent = "";
    seen.getContext("2d").clearRect(0, 0, 28, 28);
    pad.dataset.answered = "";
    say(problem || HINT, problem !== "");
  }

  function setBar(bar, probability, best) {
    bar.classList.toggle("best", best);
    bar.querySelector("u").style.width = `${100 * probability}%`;
    bar.lastChild.textContent = probability < 0.005 ? "" : percent(probability);
  }

  function percent(probability) {
    return probability > 0.995 && probability < 1 ? ">99%" : `${Math.round(100 * probability)}%`;
  }

  function say(text, problem = false) {
    status.textContent = text;
    status.classList.toggle("problem", problem);
  }

  paper.addEventListener("pointerdown", penDown);
  paper.addEventListener("pointermove", penMove);
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) paper.addEventListener(end, penUp);
  pad.addEventListener("keydown", pressKey);
  el.querySelector(".clear").addEventListener("click", clear);
  el.querySelector(".undo").addEventListener("click", undo);
  model.on("msg:custom", receive);
  return () => {
    clearTimeout(waiting);
    model.off("msg:custom", receive);
  };
}

export default { render };
