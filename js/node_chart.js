/** The chart of one node: a widget that is no part of the workflow. It is there as long as there is something to show. */

import { app } from "../../scripts/app.js";
import { draw } from "./chart_drawing.js";
import { describe, explain } from "./chart_words.js";

/**
 * @typedef {import("./chart_words.js").RunMessage} RunMessage
 * @typedef {import("./chart_words.js").NodeCurve} NodeCurve
 * @typedef {import("./chart_drawing.js").Palette} Palette
 */

const WIDGET = "lodestar_chart";
const HEIGHT = 92;
const MARGIN = 6;
const LIGHT = { curve: "#1f5fa8", mark: "#b3261e", bar: "#8aa0b8" };
const DARK = { curve: "#74b6f5", mark: "#ff8f85", bar: "#61788f" };

/** The charts that are there, by node. @type {Map<object, NodeChart>} */
const charts = new Map();
/** By how much a chart has made a node higher, which is not to be saved. @type {WeakMap<object, number>} */
const growth = new WeakMap();
/** Nodes that are serialised without their growth. @type {WeakSet<object>} */
const shrunk = new WeakSet();

/** After the theme or the language has changed. */
export function redrawAll() {
  for (const chart of charts.values()) {
    chart.describe();
    chart.redraw();
  }
}

/** @param {Map<object, unknown>} nodes all others lose their charts */
export function keepOnly(nodes) {
  for (const [node, chart] of charts) {
    if (nodes.has(node)) continue;
    charts.delete(node);
    chart.remove();
  }
}

/** @param {object} node @returns {NodeChart} the node's chart, made if there is none */
export function chartOf(node) {
  const known = charts.get(node);
  if (known) return known;
  const chart = new NodeChart(node);
  charts.set(node, chart);
  return chart;
}

class NodeChart {
  /** @param {object} node */
  constructor(node) {
    this.node = node;
    /** @type {RunMessage | undefined} */
    this.run = undefined;
    /** @type {NodeCurve | undefined} */
    this.curve = undefined;
    this.element = document.createElement("div");
    this.element.className = "lodestar-chart";
    this.element.style.cssText =
      `height: 100%; min-height: ${HEIGHT}px; position: relative; overflow: hidden; border-radius: 4px;` +
      "color: var(--input-text, #ddd);";
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.style.cssText = "position: absolute; inset: 0; width: 100%; height: 100%;";
    this.element.append(this.canvas);
    for (const type of ["wheel", "pointerdown"]) this.element.addEventListener(type, forward);
    this.observer = new ResizeObserver(() => this.redraw());
    this.observer.observe(this.element);
    this.addWidget();
  }

  /** Below the node's own widgets; other widgets keep their room. */
  addWidget() {
    const { node } = this;
    const before = node.size[1];
    const others = (node.widgets ?? []).some((widget) => widget.computeLayoutSize);
    const height = HEIGHT + 2 * MARGIN;
    this.widget = node.addDOMWidget(WIDGET, WIDGET, this.element, {
      serialize: false,
      hideOnZoom: false,
      margin: MARGIN,
      getMinHeight: () => height,
      getMaxHeight: () => (others ? height : 3 * height),
    });
    this.widget.serialize = false;
    const outside = !node.widgets?.includes(this.widget); // of a subgraph, whose node lays out only what it shows of the nodes inside
    if (outside) Object.defineProperty(this.widget, "y", { get: () => node.size[1] - height, set() {} });
    node.setSize([node.size[0], Math.max(before + (others || outside ? height : 0), node.computeSize()[1])]);
    saveWithoutGrowth(node);
    growth.set(node, node.size[1] - before);
    requestAnimationFrame(() => requestAnimationFrame(() => this.settle(before)));
    app.canvas?.setDirty(true, true);
  }

  /** Where nodes are made of HTML, the page decides how high the node has become. @param {number} before */
  settle(before) {
    if (charts.get(this.node) === this) growth.set(this.node, Math.max(0, this.node.size[1] - before));
  }

  /** Give the node its own size back. */
  remove() {
    this.observer.disconnect();
    const { node } = this;
    if (node.widgets?.includes(this.widget)) node.removeWidget(this.widget);
    else this.widget.onRemove?.();
    const height = node.size[1] - (growth.get(node) ?? 0);
    growth.delete(node);
    if (node.graph) node.setSize([node.size[0], height]);
    app.canvas?.setDirty(true, true);
  }

  /**
   * @param {RunMessage} run
   * @param {NodeCurve} curve
   */
  show(run, curve) {
    if (this.run === run && this.curve === curve) return;
    Object.assign(this, { run, curve });
    this.describe();
    this.redraw();
  }

  describe() {
    const text = describe(this.run, this.curve);
    if (text === this.canvas.ariaLabel) return;
    this.canvas.setAttribute("aria-label", text);
    this.canvas.title = `${text}. ${explain(this.curve)}`;
  }

  redraw() {
    this.element.style.background = `var(${window.LiteGraph?.vueNodesMode ? "--component-node-widget-background" : "--comfy-input-bg"}, #222)`;
    const [width, height] = [this.element.clientWidth, this.element.clientHeight];
    if (!this.run || !this.curve || !width || !height) return;
    const sharp = 2 * Math.max(1, window.devicePixelRatio); // the graph may be zoomed
    [this.canvas.width, this.canvas.height] = [width * sharp, height * sharp];
    const pen = this.canvas.getContext("2d");
    pen.scale(sharp, sharp);
    draw(pen, width, height, this.run, this.curve, palette(this.element));
  }
}

/** Let the graph be zoomed by the wheel and moved by the middle button where the chart is. @param {WheelEvent | PointerEvent} event */
function forward(event) {
  if (window.LiteGraph?.vueNodesMode || (event.type === "pointerdown" && event.button !== 1)) return; // in Vue nodes the page does it
  event.preventDefault();
  app.canvas.canvas.dispatchEvent(new event.constructor(event.type, event));
}

/** Have a node serialised as if it had no chart. @param {object} node */
function saveWithoutGrowth(node) {
  if (shrunk.has(node)) return;
  shrunk.add(node);
  const { onSerialize } = node;
  node.onSerialize = function (data) {
    onSerialize?.call(this, data);
    data.size = [data.size[0], data.size[1] - (growth.get(this) ?? 0)];
  };
}

/** Colours that suit the theme: its own for text, and curves that stand out from its background. @param {Element} element @returns {Palette} */
function palette(element) {
  const style = getComputedStyle(element);
  const ink = channels(style.color);
  const [red, green, blue] = channels(style.backgroundColor);
  const light = 0.299 * red + 0.587 * green + 0.114 * blue > 140;
  const faded = (/** @type {number} */ share) => `rgb(${ink.join(" ")} / ${share})`;
  return { paper: style.backgroundColor, ink: faded(1), soft: faded(0.7), grid: faded(0.16), ...(light ? LIGHT : DARK) };
}

/** @param {string} colour as the browser computes it @returns {number[]} red, green and blue, 0 to 255 */
function channels(colour) {
  const numbers = (colour.match(/[\d.]+/g) ?? ["0", "0", "0"]).slice(0, 3).map(Number);
  return colour.startsWith("color(") ? numbers.map((number) => number * 255) : numbers;
}
