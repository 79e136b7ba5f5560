// The browser's half of the drawing pad. The ink lives here and flows whatever the kernel does;
// the kernel is sent small grey pictures, one at a time, and answers with ten probabilities.

const SIDE = 56; // the paper in its own units, and the pixels of the picture that is sent
const PEN = 4.6; // width of a line in these units: as thick as MNIST's digits are
const PATIENCE = 3000; // milliseconds without an answer until the reader is told
const GONE = "No answer for 3 s: the kernel is busy or gone. If it was restarted, run this cell again.";
const SVG = "http://www.w3.org/2000/svg";

// The notebook's shortcuts look for this attribute on the focused element itself. Without it the
// key `x` would cut the cell with the pad, and `d d` delete it.
const NO_SHORTCUTS = 'data-lm-suppress-shortcuts="true"';

const DIGITS = [...Array(10).keys()];
const PAGE = `
  <div class="mnist-pad" role="group" aria-label="Drawing pad">
    <div class="sheet">
      <svg class="paper" ${NO_SHORTCUTS} viewBox="0 0 ${SIDE} ${SIDE}" tabindex="0" role="img"
        aria-label="Paper to draw on"></svg>
      <p class="hint">Draw a digit here<br>with mouse, pen or finger</p>
    </div>
    <div class="result">
      <figure><canvas class="seen" width="28" height="28" role="img"
        aria-label="The 28 by 28 pixels that the model sees"></canvas><figcaption>what the model sees</figcaption></figure>
      <output class="answer" aria-live="polite"><b>?</b><span></span></output>
    </div>
    <div class="bars" aria-hidden="true">
      ${DIGITS.map((digit) => `<div class="bar"><b>${digit}</b><i><u></u></i><span></span></div>`).join("")}
    </div>
    <div class="buttons">
      <button type="button" class="clear" ${NO_SHORTCUTS} title="Delete key" aria-keyshortcuts="Delete">Clear</button>
      <button type="button" class="undo" ${NO_SHORTCUTS} title="Ctrl+Z" aria-keyshortcuts="Control+Z">Undo</button>
      <span class="status" role="status"></span>
    </div>
  </div>`;

// ---- the line that a pen draws

function middle(one, other) {
  return [(one[0] + other[0]) / 2, (one[1] + other[1]) / 2];
}

// Quadratic curves `[start, control, end]` along the points that the pen went through: each runs from
// the middle of two points to the next middle, and the point between them bends it. So no corner is left.
function makeCurves(points) {
  const curves = [];
  let start = points[0];
  for (let index = 1; index < points.length; index++) {
    const end = middle(points[index - 1], points[index]);
    curves.push([start, points[index - 1], end]);
    start = end;
  }
  const last = points.at(-1);
  curves.push([start, last, last]); // straight to where the pen is now
  return curves;
}

function makePath(points) {
  return `M${points[0]}` + makeCurves(points).map(([, control, end]) => `Q${control} ${end}`).join("");
}

// The grey picture of all strokes, a byte a pixel, 255 where there is nothing but ink. It is computed and
// not read back from a canvas: against fingerprinting, some browsers give back white or noise there.
function makePicture(strokes) {
  const picture = new Uint8Array(SIDE * SIDE);
  for (const { points } of strokes)
    for (const curve of makeCurves(points)) addCurve(picture, curve);
  return picture;
}

function addCurve(picture, [start, control, end]) {
  const length = Math.hypot(control[0] - start[0], control[1] - start[1]) +
    Math.hypot(end[0] - control[0], end[1] - control[1]);
  const steps = Math.ceil(2 * length) + 1; // at most half a pixel apart
  for (let step = 0; step <= steps; step++) {
    const there = step / steps;
    const back = 1 - there;
    const [x, y] = [0, 1].map(
      (axis) => back * back * start[axis] + 2 * back * there * control[axis] + there * there * end[axis],
    );
    addDot(picture, x, y);
  }
}

function addDot(picture, x, y) {
  const reach = PEN / 2 + 0.5; // from full ink to none within one pixel
  const [left, top] = [x, y].map((value) => Math.max(0, Math.floor(value - reach)));
  const [right, bottom] = [x, y].map((value) => Math.min(SIDE - 1, Math.floor(value + reach)));
  for (let row = top; row <= bottom; row++)
    for (let column = left; column <= right; column++) {
      const distance = Math.hypot(column + 0.5 - x, row + 0.5 - y); // from the pixel's centre
      const ink = Math.min(1, Math.max(0, reach - distance));
      const pixel = row * SIDE + column;
      picture[pixel] = Math.max(picture[pixel], Math.round(255 * ink));
    }
}

function percent(probability) {
  return probability > 0.995 && probability < 1 ? ">99%" : `${Math.round(100 * probability)}%`;
}

function render({ model, el }) {
  el.innerHTML = PAGE;
  const [pad, paper, seen, answer, status] = [".mnist-pad", ".paper", ".seen", ".answer", ".status"].map(
    (name) => el.querySelector(name),
  );
  const bars = [...el.querySelectorAll(".bar")];

  // ---- drawing
  const strokes = []; // of each its points, the <path> that shows it, and the type of pointer that drew it
  let pointer = null; // the id of the pointer that is drawing

  function place(event) {
    const box = paper.getBoundingClientRect();
    const scale = SIDE / box.width;
    const point = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    return point.map((value) => Math.round(100 * value) / 100);
  }

  // One pointer draws, and a second finger or a resting palm changes nothing. A pen goes before fingers:
  // it takes over from a palm that came down first, and beside its strokes no finger draws.
  function mayDraw(type) {
    if (pointer !== null) return type === "pen" && strokes.at(-1).type === "touch";
    return type !== "touch" || !strokes.some((stroke) => stroke.type === "pen");
  }

  function penDown(event) {
    if (event.button !== 0 || !mayDraw(event.pointerType)) return;
    event.preventDefault(); // no selected text, no dragged picture
    paper.focus({ preventScroll: true }); // so that the keys work after drawing
    paper.setPointerCapture(event.pointerId); // a line may leave the paper and come back
    if (pointer !== null) removeStroke(); // the palm's
    pointer = event.pointerId;
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("stroke-width", PEN);
    paper.append(path);
    strokes.push({ path, points: [], type: event.pointerType });
    addPoints([event]); // a tap leaves a dot
    answer.ariaBusy = "true"; // a screen reader waits for the end of the stroke
  }

  function penMove(event) {
    if (event.pointerId !== pointer) return;
    const events = event.getCoalescedEvents?.() ?? []; // all places since the latest frame
    addPoints(events.length ? events : [event]);
  }

  function penUp(event) {
    if (event.pointerId !== pointer) return;
    endStroke();
    changed(true);
  }

  function addPoints(events) {
    const { path, points } = strokes.at(-1);
    points.push(...events.map(place));
    path.setAttribute("d", makePath(points));
    changed();
  }

  function endStroke() {
    pointer = null;
    answer.ariaBusy = "false";
  }

  function removeStroke() {
    strokes.pop()?.path.remove();
  }

  function undo() {
    endStroke();
    removeStroke();
    changed(true);
  }

  function clear() {
    endStroke();
    while (strokes.length) removeStroke();
    changed();
  }

  function pressKey(event) {
    const command = (event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey;
    // The letter on the key; on a keyboard of another alphabet the one that is in its place.
    const letter = (/^[a-z]$/i.test(event.key) ? event.key : event.code.slice(-1)).toLowerCase();
    if (command && letter === "z") undo();
    else if (event.key === "Delete" || event.key === "Backspace") clear();
    else if (command && letter === "s") el.dispatchEvent(new KeyboardEvent("keydown", event)); // the notebook saves
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // ---- asking the kernel: never more than one question waits for its answer
  // All views of one pad hear all answers. From a random start, no two of them use the same number.
  let sequence = Math.floor(Math.random() * 2 ** 48); // number of the latest question
  let waiting = null; // the timer of a question without an answer yet
  let dirty = false; // the drawing has changed since the latest question
  let finished = false; // a stroke has ended since then: the kernel keeps that picture

  function changed(strokeEnded = false) {
    dirty = true;
    finished ||= strokeEnded;
    if (!strokes.length) {
      showNothing();
      dirty = finished = false;
    } else if (waiting === null) ask();
  }

  function ask() {
    sequence += 1;
    waiting = setInterval(() => say(GONE, true), PATIENCE);
    model.send({ sequence, finished }, undefined, [makePicture(strokes).buffer]);
    dirty = finished = false;
  }

  function receive(message, buffers) {
    if (message.sequence !== sequence) return; // the answer to another view of this pad
    clearInterval(waiting);
    waiting = null;
    if (!strokes.length) showNothing(); // cleared in the meantime
    else if (message.problem) showNothing(message.problem);
    else showAnswer(message.probabilities, buffers[0]);
    if (dirty) ask();
  }

  // ---- showing
  function showAnswer(probabilities, pixels) {
    const best = probabilities.indexOf(Math.max(...probabilities));
    bars.forEach((bar, digit) => setBar(bar, probabilities[digit], digit === best));
    answer.firstChild.textContent = best;
    answer.lastChild.textContent = `${percent(probabilities[best])} sure`;
    const picture = new ImageData(28, 28);
    for (let pixel = 0; pixel < 28 * 28; pixel++) {
      const grey = pixels.getUint8(pixel);
      picture.data.set([grey, grey, grey, 255], 4 * pixel);
    }
    seen.getContext("2d").putImageData(picture, 0, 0);
    say("");
  }

  function showNothing(problem = "") {
    bars.forEach((bar) => setBar(bar, 0, false));
    answer.firstChild.textContent = "?";
    answer.lastChild.textContent = "";
    seen.getContext("2d").clearRect(0, 0, 28, 28);
    say(problem, true);
  }

  function setBar(bar, probability, best) {
    bar.classList.toggle("best", best);
    bar.querySelector("u").style.width = `${100 * probability}%`;
    bar.lastChild.textContent = probability < 0.005 ? "" : percent(probability);
  }

  function say(text, problem = false) {
    status.textContent = text;
    status.classList.toggle("problem", problem);
  }

  // An error on this side is shown as one of the kernel's is.
  function guard(action) {
    return (...given) => {
      try {
        action(...given);
      } catch (error) {
        say(String(error), true);
        throw error; // for the console, with the line it comes from
      }
    };
  }

  const hear = guard(receive);
  paper.addEventListener("pointerdown", guard(penDown));
  paper.addEventListener("pointermove", guard(penMove));
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) paper.addEventListener(end, guard(penUp));
  pad.addEventListener("keydown", guard(pressKey));
  el.querySelector(".clear").addEventListener("click", guard(clear));
  el.querySelector(".undo").addEventListener("click", guard(undo));
  model.on("msg:custom", hear);
  return () => {
    clearInterval(waiting);
    model.off("msg:custom", hear);
  };
}

export default { render };
