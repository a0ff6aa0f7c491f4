/** What a chart says in words: what its node did, the last value with its name, and how far the run is. */

import { say } from "./texts.js";

/**
 * @typedef {[number, number | null]} Point step and value; null is a value that is not finite
 * @typedef {{threshold: number, steps: (number | null)[]}} Switch for each picture the first step without CFG
 * @typedef {"update" | "weight" | "cosine" | "noise" | "loss" | "residual" | "error"} Kind of the curve's values
 * @typedef {"shaper" | "term" | "policy" | "cascade" | "trace"} Role of the node
 * @typedef {object} NodeCurve
 * @property {string | null} type the node's
 * @property {Role} role
 * @property {Kind} kind
 * @property {Point[]} points
 * @property {Point[]} [plain] of a shaper: the update that CFG alone would make
 * @property {Switch} [switch] of a policy with a threshold
 * @property {number[]} [predicted] of a policy: steps in which it makes up a prediction
 * @typedef {{width: number, height: number, steps: number}} Stage
 * @typedef {object} RunMessage
 * @property {string} prompt
 * @property {string} sampler the sampler's node
 * @property {string | null} workflow id of the graph
 * @property {number} serial the larger, the newer
 * @property {"step" | "run" | "iteration"} unit of what the points belong to
 * @property {number} step how many of them there are so far
 * @property {number} steps
 * @property {boolean} done
 * @property {Record<string, NodeCurve>} nodes
 * @property {number} [nfe] of a search: those of the policy that it has found so far
 * @property {number} [saved]
 * @property {Point[]} [evaluations] NFE of each step
 * @property {number} [stage]
 * @property {Stage[]} [stages]
 * @typedef {{text: string, of: "curve" | "mark" | "soft"}} Part of a line, in the colour of what it is about
 * @typedef {{verdict: string, saved: string, value: Part[], progress: string, cost: string}} Words
 */

const NO_EFFECT = 1e-5; // relative to the denoised image

/**
 * @param {RunMessage} run
 * @param {NodeCurve} curve
 * @returns {Words}
 */
export function words(run, curve) {
  return {
    verdict: verdict(run, curve),
    saved: curve.role === "policy" && run.saved ? say("saved", { count: round(run.saved) }) : "",
    value: lastValue(curve),
    progress: progress(run),
    cost: curve.role !== "trace" && run.nfe ? say("evaluations", { count: round(run.nfe) }) : "",
  };
}

/**
 * All of it in one sentence, for screen readers, and for whoever points at the chart.
 * @param {RunMessage} run
 * @param {NodeCurve} curve
 */
export function describe(run, curve) {
  const { verdict, saved, value, progress, cost } = words(run, curve);
  return [verdict, saved, ...value.map(({ text }) => text), progress, cost].filter(Boolean).join(say("comma"));
}

/** What the numbers of a chart are. @param {NodeCurve} curve */
export function explain(curve) {
  const more = curve.plain ? "explain_plain" : curve.role === "policy" ? "explain_bars" : "";
  return [`explain_${curve.kind}`, more].filter(Boolean).map((key) => say(key)).join(" ");
}

/** One glance: what the node did. */
function verdict(run, curve) {
  const values = finite(curve.points);
  if (!curve.points.length && !curve.switch) return say(run.done ? "nothing" : "nothing_yet");
  if (curve.switch) return ended(run, curve.switch);
  if (curve.role === "policy") return acted(run, curve);
  if (curve.kind === "update" && values.every((value) => Math.abs(value) < NO_EFFECT)) return say("no_effect");
  if (curve.role === "cascade") return work(run);
  if (curve.plain?.length) return reshaped(curve);
  const last = values.at(-1) ?? 0;
  const mean = values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);
  return {
    update: () => say("adds", { most: percent(Math.max(...values)) }),
    cosine: () => say("value_cosine", { value: short(last) }),
    weight: () => say("worth", { cfg: short(mean) }),
    noise: () => say("noise_found", { percent: percent(last) }),
    loss: () => say(run.done ? "policy" : "policy_so_far", { nfe: round(run.nfe), whole: round(run.nfe + run.saved) }),
    residual: () => say("misses", { percent: percent(last) }),
    error: () => say("disagrees", { percent: percent(last) }),
  }[curve.kind]();
}

/** When a policy with a threshold ended CFG. */
function ended(run, { steps }) {
  const met = steps.filter((step) => step !== null);
  if (!met.length) return say(run.done ? "never_ended" : "not_ended");
  const [first, last] = [Math.min(...met), Math.max(...met)];
  if (met.length < steps.length) return say("ended_for", { met: met.length, pictures: steps.length });
  return first === last ? say("ended", { step: first, steps: run.steps }) : say("ended_between", { first, last, steps: run.steps });
}

/** In which steps a policy had CFG: those with an update of CFG. */
function acted(run, { points, predicted = [] }) {
  const steps = points.map(([step]) => step);
  if (predicted.length) return say("predicted", { guided: steps.length, predicted: predicted.length, steps: run.steps });
  if (steps.length === run.step) return say(run.done ? "always" : "always_so_far");
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  if (last - first + 1 > steps.length) return say("scattered", { guided: steps.length, steps: run.steps });
  return say("between", { first: first + 1, last: last + 1, steps: run.steps });
}

/** What a shaper made of CFG's update. */
function reshaped({ points, plain }) {
  const before = new Map(plain);
  const pairs = points.map(([step, value]) => [value, before.get(step)]).filter((pair) => pair.every((value) => value != null));
  const [after, whole] = [0, 1].map((index) => pairs.reduce((sum, pair) => sum + pair[index], 0));
  const share = whole ? after / whole : 1;
  if (Math.abs(share - 1) < 0.005) return say("kept");
  return say(share < 1 ? "shrunk" : "grown", { percent: percent(share) });
}

/** What a cascade costs: its steps in steps of the last stage's size. */
function work({ stages, steps }) {
  const { width, height } = stages.at(-1);
  const pixels = stages.reduce((sum, stage) => sum + stage.steps * stage.width * stage.height, 0);
  return say("cascade", { steps, work: short(pixels / (width * height)), width, height });
}

/** Name, value and unit of the last point, and what it is to be compared with. @returns {Part[]} */
function lastValue(curve) {
  const value = curve.points.at(-1)?.[1];
  const parts = [];
  if (value != null) {
    const name = curve.kind === "update" && ["policy", "cascade"].includes(curve.role) ? "cfg_update" : curve.kind;
    const number = ["update", "noise", "residual", "error"].includes(curve.kind) ? percent(value) : short(value);
    parts.push({ text: say(`value_${name}`, { value: number }), of: "curve" });
  }
  const plain = curve.plain?.at(-1)?.[1];
  if (plain != null) parts.push({ text: say("value_plain", { value: percent(plain) }), of: "soft" });
  if (curve.switch) parts.push({ text: say("value_threshold", { value: short(curve.switch.threshold) }), of: "mark" });
  return parts;
}

/** @param {RunMessage} run */
function progress(run) {
  const at = say(`unit_${run.unit}`, { at: run.step, all: run.steps });
  return run.stages ? `${say("unit_stage", { at: run.stage + 1, all: run.stages.length })}${say("comma")}${at}` : at;
}

/** @param {Point[]} points @returns {number[]} */
function finite(points) {
  return points.map(([, value]) => value).filter((value) => value !== null);
}

/** @param {number} value a share @returns {string} */
export function percent(value) {
  return `${Number((value * 100).toPrecision(value < 1 ? 2 : 3))} %`;
}

/** @param {number} value @returns {string} */
export function short(value) {
  return String(Number(value.toPrecision(Math.abs(value) > 0.9 && Math.abs(value) < 1 ? 4 : 3)));
}

/** @param {number} value @returns {number} a count that need not be whole */
function round(value) {
  return Math.round(value * 100) / 100;
}
