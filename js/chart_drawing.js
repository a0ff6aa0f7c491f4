/** Draws one chart on a canvas. Knows nothing of the graph, the host or the network. */

/**
 * @typedef {[number, number | null]} Point step and value; null is a value that is not finite
 * @typedef {{threshold: number, steps: (number | null)[]}} Switch for each picture the first step without CFG
 * @typedef {"update" | "weight" | "error" | "cosine"} Kind of the curve's values
 * @typedef {{curve: string, kind: Kind, points: Point[], policy: boolean, switch?: Switch}} NodeCurve
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
 * @typedef {{paper: string, ink: string, soft: string, grid: string, curve: string, mark: string, bar: string}} Palette
 * @typedef {{left: number, right: number, top: number, bottom: number}} Box
 */

const PAD = 5;
const HEAD = 14;
const STRIP = 8;
const FONT = "11px Inter, system-ui, sans-serif";
const SMALL = "10px Inter, system-ui, sans-serif";

/**
 * What the chart says, for the line above the curve and for screen readers.
 * @param {RunMessage} run
 * @returns {{cost: string, progress: string}}
 */
export function headline(run) {
  const whole = round(run.nfe + run.saved);
  const cost = run.saved ? `NFE ${round(run.nfe)} of ${whole} (${round(run.saved)} saved)` : `NFE ${round(run.nfe)}`;
  const stage = run.stages ? `stage ${run.stage + 1}/${run.stages.length}, ` : "";
  return { cost, progress: `${stage}step ${run.step}/${run.steps}` };
}

/**
 * One sentence with the numbers.
 * @param {RunMessage} run
 * @param {NodeCurve} curve
 * @returns {string}
 */
export function describe(run, curve) {
  const { cost, progress } = headline(run);
  return [cost, progress, lastValue(curve) ?? "nothing to show so far", switched(curve)].filter(Boolean).join(", ");
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
  drawHead(pen, width, run, curve, palette);
  const strip = curve.policy ? STRIP : 0;
  const box = { left: PAD, right: width - PAD, top: PAD + HEAD, bottom: height - PAD - strip };
  const x = (/** @type {number} */ step) => box.left + ((step + 0.5) / Math.max(run.steps, 1)) * (box.right - box.left);
  const y = scale(curve, box);
  line(pen, [[box.left, box.bottom], [box.right, box.bottom]], palette.grid, 1);
  drawStages(pen, run, x, box, palette);
  drawLevels(pen, curve, x, y, box, palette);
  drawCurve(pen, curve, x, y, palette);
  drawLabels(pen, run, curve, x, y, box, palette);
  if (curve.policy) drawEvaluations(pen, run, x, box.bottom + 3, height - PAD, palette);
}

/** Cost at the left, value and progress at the right as far as they fit. */
function drawHead(pen, width, run, curve, palette) {
  const { cost, progress } = headline(run);
  const middle = PAD + HEAD / 2 - 2;
  pen.font = FONT;
  label(pen, cost, PAD, middle, "left", "middle", palette.ink);
  const free = width - 3 * PAD - pen.measureText(cost).width;
  const value = lastValue(curve);
  const text = [value ? `${value} · ${progress}` : progress, progress].find((fitting) => pen.measureText(fitting).width <= free);
  if (text) label(pen, text, width - PAD, middle, "right", "middle", palette.soft);
}

/** The stage of a cascade that is being sampled, and where each one ends. */
function drawStages(pen, run, x, box, palette) {
  for (const { index, first, end } of stagesOf(run)) {
    if (index === run.stage && !run.done) {
      pen.fillStyle = palette.grid;
      pen.fillRect(x(first - 0.5), box.top, x(end - 0.5) - x(first - 0.5), box.bottom - box.top);
    }
    if (index > 0) line(pen, [[x(first - 0.5), box.top], [x(first - 0.5), box.bottom]], palette.soft, 1);
  }
}

/** The largest value, or the threshold as a dashed line with a mark at every step from which pictures go on without CFG. */
function drawLevels(pen, curve, x, y, box, palette) {
  if (!curve.switch) {
    if (curve.points.length) line(pen, [[box.left, y.top], [box.right, y.top]], palette.grid, 1);
    return;
  }
  const level = y(curve.switch.threshold);
  pen.setLineDash([4, 3]);
  line(pen, [[box.left, level], [box.right, level]], palette.mark, 1);
  pen.setLineDash([]);
  for (const step of new Set(curve.switch.steps)) {
    if (step !== null) line(pen, [[x(step - 0.5), box.top], [x(step - 0.5), box.bottom]], palette.mark, 1);
  }
}

/** What is written into the plot, over the curve. */
function drawLabels(pen, run, curve, x, y, box, palette) {
  pen.font = SMALL;
  if (!curve.points.length) label(pen, "nothing to show so far", box.left, box.top + 1, "left", "top", palette.soft, palette.paper);
  for (const { stage, first, end } of stagesOf(run)) {
    const text = `${stage.width}×${stage.height}`;
    if (pen.measureText(text).width > x(end) - x(first) - 4) continue;
    label(pen, text, x(end - 0.5) - 3, box.top + 2, "right", "top", palette.soft, palette.paper);
  }
  if (curve.switch) {
    const level = y(curve.switch.threshold);
    const above = level - box.top > 14;
    const text = `threshold ${short(curve.switch.threshold)}`;
    label(pen, text, box.left, level + (above ? -2 : 3), "left", above ? "bottom" : "top", palette.mark, palette.paper);
    label(pen, switched(curve), box.right, box.bottom - 2, "right", "bottom", palette.mark, palette.paper);
  } else if (curve.points.length && !run.stages) {
    label(pen, short(y.high), box.right, y.top + 2, "right", "top", palette.soft, palette.paper); // most curves fall
  }
}

/** The unbroken pieces, and a dot at the last value. */
function drawCurve(pen, curve, x, y, palette) {
  const known = curve.points.filter(([, value]) => value !== null);
  for (const piece of pieces(known)) {
    line(pen, piece.map(([step, value]) => [x(step), y(value)]), palette.curve, 1.75);
    if (piece.length === 1) dot(pen, x(piece[0][0]), y(piece[0][1]), 2, palette.curve);
  }
  const last = known.at(-1);
  if (last) dot(pen, x(last[0]), y(last[1]), 2.5, palette.curve);
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
    const margin = Math.max((Math.max(...all) - Math.min(...all)) * 0.15, 1e-4);
    [low, high] = [Math.min(...all) - margin, Math.max(...all) + margin];
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

/** @param {RunMessage} run the stages of a cascade with their first step and the first one after them */
function stagesOf(run) {
  let end = 0;
  return (run.stages ?? []).map((stage, index) => ({ stage, index, first: end, end: (end += stage.steps) }));
}

/** @param {NodeCurve} curve @returns {string | undefined} its last value and what that is */
function lastValue(curve) {
  const value = curve.points.at(-1)?.[1];
  if (value == null) return undefined;
  const names = { update: curve.policy ? "CFG update" : "update", weight: "cfg", error: "error", cosine: "γ" };
  return `${names[curve.kind]} ${short(value)}`;
}

/** @param {NodeCurve} curve @returns {string} how many pictures go on without CFG */
function switched(curve) {
  const steps = curve.switch?.steps ?? [];
  const met = steps.filter((step) => step !== null);
  if (!met.length) return "";
  return steps.length === 1 ? `CFG ended after ${met[0]} steps` : `CFG ended for ${met.length} of ${steps.length}`;
}

/** Text; with a paper also on a halo of it, to be read over a curve. */
function label(pen, text, x, y, align, baseline, colour, paper) {
  [pen.textAlign, pen.textBaseline] = [align, baseline];
  if (paper) {
    [pen.strokeStyle, pen.lineWidth, pen.lineJoin] = [paper, 3, "round"];
    pen.strokeText(text, x, y);
  }
  pen.fillStyle = colour;
  pen.fillText(text, x, y);
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
