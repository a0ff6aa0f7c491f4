/** Draws one chart on a canvas. Knows nothing of the graph, the host or the network. */

/**
 * @typedef {[number, number | null]} Point step and value; null is a value that is not finite
 * @typedef {{threshold: number, steps: (number | null)[]}} Switch for each picture the first step without CFG
 * @typedef {{curve: string, points: Point[], policy: boolean, switch?: Switch}} NodeCurve
 * @typedef {{width: number, height: number, steps: number}} Stage
 * @typedef {object} RunMessage
 * @property {string} prompt
 * @property {string} sampler the sampler's node
 * @property {string | null} workflow id of the graph
 * @property {number} serial the larger, the newer
 * @property {number} step steps evaluated so far
 * @property {number} steps
 * @property {number} nfe
 * @property {number} saved
 * @property {Point[]} evaluations NFE of each step
 * @property {boolean} done
 * @property {Record<string, NodeCurve>} nodes
 * @property {number} [stage]
 * @property {Stage[]} [stages]
 * @typedef {{ink: string, soft: string, grid: string, curve: string, mark: string, bar: string}} Palette
 * @typedef {{left: number, right: number, top: number, bottom: number}} Box
 */

const PAD = 6;
const HEAD = 16;
const STRIP = 9;
const FONT = "11px Inter, system-ui, sans-serif";
const SMALL = "10px Inter, system-ui, sans-serif";

/**
 * What the chart says, for the line above the curve and for screen readers.
 * @param {RunMessage} run
 * @returns {{cost: string, place: string}}
 */
export function headline(run) {
  const whole = round(run.nfe + run.saved);
  const cost = run.saved ? `NFE ${round(run.nfe)} of ${whole} (${round(run.saved)} saved)` : `NFE ${round(run.nfe)}`;
  if (!run.stages) return { cost, place: `step ${run.step}/${run.steps}` };
  const stage = run.stages[run.stage];
  return { cost, place: `stage ${run.stage + 1}/${run.stages.length}: ${stage.width}×${stage.height}` };
}

/**
 * One sentence with the numbers.
 * @param {RunMessage} run
 * @param {NodeCurve} curve
 * @returns {string}
 */
export function describe(run, curve) {
  const { cost, place } = headline(run);
  const last = curve.points.at(-1);
  const value = last?.[1] == null ? "nothing recorded yet" : `${meaning(curve)} ${short(last[1])}`;
  return `${cost}, ${place}, ${value}${switched(curve)}`;
}

/**
 * @param {CanvasRenderingContext2D} pen
 * @param {number} width in CSS pixels
 * @param {number} height
 * @param {RunMessage} run
 * @param {NodeCurve} curve
 * @param {Palette} palette
 */
export function draw(pen, width, height, run, curve, palette) {
  pen.clearRect(0, 0, width, height);
  drawHead(pen, width, run, palette);
  const strip = curve.policy ? STRIP : 0;
  const box = { left: PAD, right: width - PAD, top: PAD + HEAD, bottom: height - PAD - strip };
  const x = (/** @type {number} */ step) => box.left + ((step + 0.5) / Math.max(run.steps, 1)) * (box.right - box.left);
  drawStages(pen, run, x, box, palette);
  const y = scale(curve, box);
  drawFrame(pen, curve, y, box, palette);
  drawSwitch(pen, curve, x, y, box, palette);
  drawCurve(pen, curve, x, y, palette);
  drawValue(pen, curve, box, palette);
  if (curve.policy) drawEvaluations(pen, run, x, box.bottom + 3, height - PAD, palette);
}

/** Cost at the left, place in the schedule at the right; the place gives way where both do not fit. */
function drawHead(pen, width, run, palette) {
  const { cost, place } = headline(run);
  pen.font = FONT;
  pen.textBaseline = "middle";
  pen.fillStyle = palette.ink;
  pen.textAlign = "left";
  pen.fillText(cost, PAD, PAD + HEAD / 2 - 2);
  if (pen.measureText(cost).width + pen.measureText(place).width + 3 * PAD > width) return;
  pen.fillStyle = palette.soft;
  pen.textAlign = "right";
  pen.fillText(place, width - PAD, PAD + HEAD / 2 - 2);
}

/** Where one stage of a cascade ends and the next one begins, and how large each is. */
function drawStages(pen, run, x, box, palette) {
  let first = 0;
  for (const [index, stage] of (run.stages ?? []).entries()) {
    if (index === run.stage && !run.done) {
      pen.fillStyle = palette.grid;
      pen.fillRect(x(first - 0.5), box.top, x(first + stage.steps - 0.5) - x(first - 0.5), box.bottom - box.top);
    }
    if (index > 0) line(pen, [[x(first - 0.5), box.top], [x(first - 0.5), box.bottom]], palette.soft, 1);
    pen.font = SMALL;
    pen.fillStyle = palette.soft;
    pen.textAlign = "left";
    pen.textBaseline = "bottom";
    const text = `${stage.width}×${stage.height}`;
    const room = x(first + stage.steps - 0.5) - x(first - 0.5) - 4;
    if (pen.measureText(text).width <= room) pen.fillText(text, x(first - 0.5) + 3, box.bottom - 1);
    first += stage.steps;
  }
}

/** The base line, and where there is a scale from 0, the largest value. */
function drawFrame(pen, curve, y, box, palette) {
  line(pen, [[box.left, box.bottom], [box.right, box.bottom]], palette.grid, 1);
  pen.font = SMALL;
  pen.fillStyle = palette.soft;
  pen.textAlign = "left";
  pen.textBaseline = "top";
  if (!curve.points.length) pen.fillText("nothing to show so far", box.left, box.top + 1);
  else if (!curve.switch) {
    line(pen, [[box.left, y.top], [box.right, y.top]], palette.grid, 1);
    pen.fillText(short(y.high), box.left, y.top + 2);
  }
}

/** A dashed line at the threshold, and a mark at every step from which pictures go on without CFG. */
function drawSwitch(pen, curve, x, y, box, palette) {
  if (!curve.switch) return;
  const level = y(curve.switch.threshold);
  pen.setLineDash([4, 3]);
  line(pen, [[box.left, level], [box.right, level]], palette.mark, 1);
  pen.setLineDash([]);
  pen.font = SMALL;
  pen.fillStyle = palette.mark;
  pen.textAlign = "left";
  pen.textBaseline = level - box.top > 14 ? "bottom" : "top";
  pen.fillText(`threshold ${short(curve.switch.threshold)}`, box.left, level + (level - box.top > 14 ? -1 : 2));
  for (const step of new Set(curve.switch.steps)) {
    if (step !== null) line(pen, [[x(step - 0.5), box.top], [x(step - 0.5), box.bottom]], palette.mark, 1);
  }
}

/** The unbroken pieces, and a dot at the last value. */
function drawCurve(pen, curve, x, y, palette) {
  const known = curve.points.filter(([, value]) => value !== null);
  for (const piece of pieces(known)) {
    line(pen, piece.map(([step, value]) => [x(step), y(value)]), palette.curve, 1.75);
    if (piece.length === 1) dot(pen, x(piece[0][0]), y(piece[0][1]), 1.5, palette.curve);
  }
  const last = known.at(-1);
  if (last) dot(pen, x(last[0]), y(last[1]), 2.5, palette.curve);
}

/** What the curve is and its last value, at the upper right. */
function drawValue(pen, curve, box, palette) {
  const last = curve.points.at(-1)?.[1];
  if (last == null) return;
  pen.font = SMALL;
  pen.textAlign = "right";
  pen.textBaseline = "top";
  pen.fillStyle = palette.curve;
  const atTop = curve.switch !== undefined;
  pen.fillText(`${meaning(curve)} ${short(last)}${switched(curve)}`, box.right, atTop ? box.bottom - 13 : box.top + 2);
}

/** For a policy: one bar per step, as high as its evaluations. */
function drawEvaluations(pen, run, x, top, bottom, palette) {
  const most = Math.max(1, ...run.evaluations.map(([, value]) => value ?? 0));
  const width = Math.max(1, x(1) - x(0) - 1);
  pen.fillStyle = palette.bar;
  for (const [step, value] of run.evaluations) {
    const height = ((value ?? 0) / most) * (bottom - top);
    pen.fillRect(x(step) - width / 2, bottom - height, width, height);
  }
}

/**
 * Values to pixels: from 0 for sizes; around the values and the threshold for a cosine.
 * @param {NodeCurve} curve
 * @param {Box} box
 */
function scale(curve, box) {
  const values = curve.points.map(([, value]) => value).filter((value) => value !== null);
  const threshold = curve.switch?.threshold;
  let [low, high] = [0, Math.max(...values, 0) || 1];
  if (threshold !== undefined) {
    const all = [...values, threshold];
    const room = Math.max((Math.max(...all) - Math.min(...all)) * 0.15, 1e-4);
    [low, high] = [Math.min(...all) - room, Math.max(...all) + room];
  }
  const top = box.top + (threshold === undefined ? 2 : 0);
  const y = (/** @type {number} */ value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - top);
  return Object.assign(y, { high, top });
}

/** @param {Point[]} points @returns {[number, number][][]} those of consecutive steps */
function pieces(points) {
  const found = [];
  let before = -2;
  for (const point of points) {
    if (point[0] !== before + 1) found.push([]);
    found.at(-1).push(point);
    before = point[0];
  }
  return found;
}

/** @param {NodeCurve} curve @returns {string} what its values are */
function meaning(curve) {
  if (curve.switch) return "γ";
  return curve.policy ? "CFG update" : "update";
}

/** @param {NodeCurve} curve @returns {string} how many pictures go on without CFG */
function switched(curve) {
  const steps = curve.switch?.steps ?? [];
  const met = steps.filter((step) => step !== null);
  if (!met.length) return "";
  return steps.length === 1 ? `, CFG ended at step ${met[0] + 1}` : `, CFG ended for ${met.length} of ${steps.length}`;
}

function line(pen, points, colour, width) {
  pen.beginPath();
  for (const [x, y] of points) pen.lineTo(x, y);
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.lineJoin = "round";
  pen.stroke();
}

function dot(pen, x, y, radius, colour) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fillStyle = colour;
  pen.fill();
}

/** @param {number} value @returns {number} a count that need not be whole */
function round(value) {
  return Math.round(value * 100) / 100;
}

/** @param {number} value @returns {string} */
function short(value) {
  return String(Number(value.toPrecision(Math.abs(value) > 0.9 && Math.abs(value) < 1 ? 4 : 3)));
}
