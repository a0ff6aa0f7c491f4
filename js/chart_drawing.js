/** Draws one chart on a canvas. Knows nothing of the graph, the host or the network. */

import { percent, short, words } from "./chart_words.js";
import { say } from "./texts.js";

/**
 * @typedef {import("./chart_words.js").Point} Point
 * @typedef {import("./chart_words.js").NodeCurve} NodeCurve
 * @typedef {import("./chart_words.js").RunMessage} RunMessage
 * @typedef {{paper: string, ink: string, soft: string, grid: string, curve: string, mark: string, bar: string}} Palette
 * @typedef {{left: number, right: number, top: number, bottom: number}} Box of the plot; all text is outside of it
 * @typedef {{low: number, high: number, ticks: [number, string][], level?: number}} Axis
 * @typedef {{pen: CanvasRenderingContext2D, run: RunMessage, curve: NodeCurve, palette: Palette, box: Box, axis: Axis,
 *   x: (step: number) => number, y: (value: number) => number}} Plot
 */

const PAD = 6;
const LINE = 13; // each of the two lines of words above the plot
const FOOT = 11; // the line below it
const STRIP = 9; // a policy's bars
const TICK = 9; // the least distance of two numbers beside the plot
const FONTS = { verdict: "600 11px Inter, system-ui, sans-serif", line: "11px Inter, system-ui, sans-serif", small: "9px Inter, system-ui, sans-serif" };

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
  drawWords(pen, width, run, curve, palette);
  const strip = hasBars(run, curve) ? STRIP : 0;
  const axis = axisOf(curve);
  pen.font = FONTS.small;
  const numbers = [...axis.ticks.map(([, text]) => text), ...(strip ? [mostText(run)] : [])];
  const left = PAD + Math.max(...numbers.map((text) => pen.measureText(text).width)) + 4;
  const box = { left, right: width - PAD, top: PAD + 2 * LINE + 2, bottom: height - PAD - FOOT - strip + 2 };
  const x = (/** @type {number} */ step) => box.left + ((step + 0.5) / Math.max(run.steps, 1)) * (box.right - box.left);
  const y = (/** @type {number} */ value) => box.bottom - ((value - axis.low) / (axis.high - axis.low)) * (box.bottom - box.top);
  const plot = { pen, run, curve, palette, box, axis, x, y };
  drawFrame(plot);
  drawStages(plot);
  drawLevels(plot);
  drawCurves(plot);
  if (strip) drawBars(plot, box.bottom + 3, box.bottom + STRIP);
  drawFoot(plot, height - PAD + 2);
}

/** What the node did, in the first line; the last value with its name, and progress or cost, in the second one; each as far as it fits. */
function drawWords(pen, width, run, curve, palette) {
  const { verdict, saved, value, progress, cost } = words(run, curve);
  const [first, second] = [PAD + LINE / 2 - 1, PAD + LINE * 1.5 - 1];
  const room = width - 2 * PAD;
  pen.font = FONTS.verdict;
  const whole = [verdict, saved].filter(Boolean).join(say("comma"));
  const fits = pen.measureText(whole).width <= room;
  label(pen, fits ? whole : verdict, PAD, first, "left", "middle", palette.ink, room);
  pen.font = FONTS.line;
  let at = PAD;
  for (const { text, of } of value) {
    const wide = pen.measureText(text).width;
    if (at + wide > width - PAD) break;
    label(pen, text, at, second, "left", "middle", palette[of]);
    at += wide + 8;
  }
  const right = [fits ? "" : saved, run.done ? cost : progress, progress].filter(Boolean);
  const fitting = right.find((text) => at + pen.measureText(text).width <= width - PAD);
  if (fitting) label(pen, fitting, width - PAD, second, "right", "middle", palette.soft);
}

/** The ground line, the top of the axis, and the numbers beside the plot. @param {Plot} plot */
function drawFrame({ pen, axis, box, palette, y }) {
  for (const level of [box.bottom, box.top]) line(pen, [[box.left, level], [box.right, level]], palette.grid, 1);
  pen.font = FONTS.small;
  let before = Infinity;
  for (const [value, text] of axis.ticks) {
    const level = Math.min(Math.max(y(value), box.top + 3), box.bottom - 3);
    if (before - level < TICK) continue;
    label(pen, text, box.left - 4, level, "right", "middle", palette.soft);
    before = level;
  }
}

/** The stage of a cascade that is being sampled, and where each one ends. @param {Plot} plot */
function drawStages({ pen, run, x, box, palette }) {
  for (const { index, first, end } of stagesOf(run)) {
    if (index === run.stage && !run.done) {
      pen.fillStyle = palette.grid;
      pen.fillRect(x(first - 0.5), box.top, x(end - 0.5) - x(first - 0.5), box.bottom - box.top);
    }
    if (index > 0) line(pen, [[x(first - 0.5), box.top], [x(first - 0.5), box.bottom]], palette.soft, 1);
  }
}

/** What the curve is compared with, as a dashed line, and a mark at every step from which pictures go on without CFG. @param {Plot} plot */
function drawLevels({ pen, curve, axis, x, y, box, palette }) {
  if (axis.level !== undefined) {
    const level = y(axis.level);
    dashed(pen, () => line(pen, [[box.left, level], [box.right, level]], curve.switch ? palette.mark : palette.soft, 1));
  }
  for (const step of new Set(curve.switch?.steps)) {
    if (step !== null) line(pen, [[x(step - 0.5), box.top], [x(step - 0.5), box.bottom]], palette.mark, 1);
  }
}

/** The curve, and a shaper's before it: what CFG alone would do, as far as the axis goes. @param {Plot} plot */
function drawCurves({ pen, curve, x, y, box, palette }) {
  pen.save();
  pen.beginPath();
  pen.rect(box.left, box.top - 2, box.right - box.left, box.bottom - box.top + 4);
  pen.clip();
  dashed(pen, () => drawPieces(pen, curve.plain ?? [], x, y, palette.soft, 1));
  const last = drawPieces(pen, curve.points, x, y, palette.curve, 1.75);
  if (last) dot(pen, x(last[0]), y(last[1]), 2.5, palette.curve);
  pen.restore();
}

/** The unbroken pieces of a curve. @returns {Point | undefined} its last point */
function drawPieces(pen, points, x, y, colour, width) {
  const known = points.filter(([, value]) => value !== null);
  for (const piece of pieces(known)) {
    line(pen, piece.map(([step, value]) => [x(step), y(value)]), colour, width);
    if (piece.length === 1) dot(pen, x(piece[0][0]), y(piece[0][1]), width, colour);
  }
  return known.at(-1);
}

/** For a policy: one bar per step, as high as its evaluations. @param {Plot} plot */
function drawBars({ pen, run, x, box, palette }, top, bottom) {
  const most = mostEvaluations(run);
  const width = Math.max(1, x(1) - x(0) - 1);
  pen.fillStyle = palette.bar;
  for (const [step, value] of run.evaluations) {
    const height = ((value ?? 0) / most) * (bottom - top);
    pen.fillRect(x(step) - width / 2, bottom - height, width, height);
  }
  pen.font = FONTS.small;
  label(pen, mostText(run), box.left - 4, (top + bottom) / 2 + 1, "right", "middle", palette.soft);
}

/** Below the plot: the sizes of a cascade's stages, or the first and the last step. @param {Plot} plot */
function drawFoot({ pen, run, x, box, palette }, bottom) {
  pen.font = FONTS.small;
  for (const { stage, first, end } of stagesOf(run)) {
    const text = `${stage.width}×${stage.height}`;
    const fits = pen.measureText(text).width <= x(end) - x(first);
    if (fits) label(pen, text, (x(first - 0.5) + x(end - 0.5)) / 2, bottom, "center", "bottom", palette.soft);
  }
  if (run.stages) return;
  label(pen, say(`axis_${run.unit}`), box.left, bottom, "left", "bottom", palette.soft);
  if (run.steps > 1) label(pen, String(run.steps), box.right, bottom, "right", "bottom", palette.soft);
}

/**
 * From 0 to the whole image for updates, from the first value to 1 for cosines, and from 0 on for everything else.
 * @param {NodeCurve} curve
 * @returns {Axis} with numbers from below
 */
function axisOf({ kind, points, switch: criterion }) {
  const values = points.map(([, value]) => value).filter((value) => value !== null);
  const most = Math.max(...values, 0);
  if (kind === "cosine") {
    const level = criterion?.threshold;
    const low = Math.min(...values, level ?? 1, 1 - 1e-4);
    return { low, high: 1, level, ticks: [[low, short(low)], [1, "1"]] };
  }
  if (kind === "weight" || kind === "loss") {
    const high = rounded(most);
    return { low: 0, high, ticks: [[0, "0"], [high, short(high)]] };
  }
  const least = { update: 1, noise: 1.5, residual: 0, error: 0 }[kind];
  const high = most > least ? rounded(most) : least || 1;
  const level = kind === "noise" ? 1 : undefined;
  return { low: 0, high, level, ticks: [[0, "0"], ...(level ? [[level, percent(level)]] : []), [high, percent(high)]] };
}

/** @param {number} value @returns {number} the next larger one, two or five of a power of ten */
function rounded(value) {
  const unit = 10 ** Math.floor(Math.log10(value || 1));
  return unit * ([1, 2, 5].find((factor) => value <= factor * unit) ?? 10);
}

/** @param {RunMessage} run @param {NodeCurve} curve */
function hasBars(run, curve) {
  return curve.role === "policy" && Boolean(run.evaluations?.length);
}

/** @param {RunMessage} run the height of the highest bar */
function mostEvaluations(run) {
  return Math.max(1, ...run.evaluations.map(([, value]) => value ?? 0));
}

/** @param {RunMessage} run */
function mostText(run) {
  return say("axis_nfe", { most: short(mostEvaluations(run)) });
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

/** Text, made narrower if it must be to fit. */
function label(pen, text, x, y, align, baseline, colour, most = undefined) {
  [pen.textAlign, pen.textBaseline, pen.fillStyle] = [align, baseline, colour];
  pen.fillText(text, x, y, most);
}

function dashed(pen, drawing) {
  pen.setLineDash([4, 3]);
  drawing();
  pen.setLineDash([]);
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
