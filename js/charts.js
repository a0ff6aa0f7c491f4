/** Live charts in guidance nodes: what each node does while a sampler runs. The server's part is charts.py. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { chartOf, keepOnly, redrawAll } from "./node_chart.js";
import { loadTexts } from "./texts.js";

/** @typedef {import("./chart_words.js").RunMessage} RunMessage */

const EVENT = "lodestar.run";
const ROUTE = "/lodestar/charts";
const SETTING = "Lodestar.LiveCharts";
const SKIPPED = [2, 4]; // modes of muted and bypassed nodes
const TELLING = ["trace", "term", "shaper", "cascade", "policy"]; // the roles of charts, that which tells most of a run last

/**
 * The last messages of every sampler, in the order in which they ran: of its last prompt, one for each set of nodes, as it may compare models.
 * @type {RunMessage[]}
 */
let runs = [];
/** The setting. */
let wanted = true;
/** The client for which the server knows the setting. @type {string | undefined} */
let subscribed;

/** Tell the server whether this page draws charts; it answers with what the page has missed. */
async function subscribe() {
  const client = api.clientId;
  if (!client) return; // comes with the first status
  subscribed = client;
  try {
    await loadTexts();
    const answer = await api.fetchApi(ROUTE, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ client_id: client, on: wanted }),
    });
    if (!answer.ok) return;
    for (const run of (await answer.json()).runs) remember(run);
    refresh();
  } catch {
    subscribed = undefined; // the server is away: the next status tries again
  }
}

/** @param {RunMessage} run */
function remember(run) {
  if (runs.some((known) => known.prompt === run.prompt && outdated(known, run) && known.serial > run.serial)) return;
  runs = [...runs.filter((known) => !outdated(known, run)), run];
}

/** @param {RunMessage} run @param {RunMessage} by @returns {boolean} whether a message replaces an earlier one */
function outdated(run, by) {
  if (run.workflow !== by.workflow || run.sampler !== by.sampler) return false;
  return run.prompt !== by.prompt || Object.keys(run.nodes).sort().join() === Object.keys(by.nodes).sort().join();
}

/** Draw what is known about the open workflow, and take charts away where there is nothing to show any more. */
function refresh() {
  const graph = app.rootGraph ?? app.graph;
  /** @type {Map<object, [RunMessage, import("./chart_words.js").NodeCurve]>} */
  const shown = new Map();
  for (const run of wanted && graph ? runs : []) {
    if (run.workflow !== graph.id) continue; // a run of another graph, whose nodes have the same ids
    for (const [id, curve] of Object.entries(run.nodes)) {
      const node = nodeAt(graph, id);
      if (node?.type !== curve.type) continue;
      shown.set(node, [run, curve]);
      if (window.LiteGraph?.vueNodesMode) continue; // there a subgraph's node has no room for it
      const outside = nodeAt(graph, id.split(":")[0]); // of a subgraph people see its node: that shows the chart that tells most
      const before = shown.get(outside);
      if (outside !== node && !(before && TELLING.indexOf(before[1].role) > TELLING.indexOf(curve.role))) shown.set(outside, [run, curve]);
    }
  }
  keepOnly(shown);
  for (const [node, [run, curve]] of shown) chartOf(node).show(run, curve);
}

/**
 * The node that an execution id stands for: "12:3" is node 3 in the subgraph of node 12. None if it is skipped.
 * @param {object} graph
 * @param {string} id
 */
function nodeAt(graph, id) {
  let node;
  for (const part of id.split(":")) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    if (!node || SKIPPED.includes(node.mode)) return undefined;
    graph = node.subgraph;
  }
  return node;
}

app.registerExtension({
  name: "Lodestar.Charts",
  settings: [
    {
      id: SETTING,
      name: "Live charts in guidance nodes",
      category: ["Lodestar", "Charts", "Live charts"],
      tooltip: "While a sampler runs, guidance nodes show the size of their update in every step and the evaluations saved so far. Off: nothing is computed for it.",
      type: "boolean",
      defaultValue: true,
      onChange: (value) => {
        wanted = value; // also called with the stored value when the page is loaded
        subscribe();
        refresh();
      },
    },
  ],
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      remember(detail);
      refresh();
    });
    api.addEventListener("reconnected", () => {
      subscribed = undefined; // it may be another server
    });
    api.addEventListener("status", () => {
      if (api.clientId !== subscribed) subscribe();
    });
    api.addEventListener("graphChanged", refresh); // nodes may have been bypassed, or come back
    new MutationObserver(redrawAll).observe(document.documentElement, { attributeFilter: ["class", "style"] });
    new MutationObserver(redrawAll).observe(document.body, { attributeFilter: ["class", "style"] });
    app.ui.settings.addEventListener("Comfy.Locale.change", redrawAll);
    subscribe();
  },
  afterConfigureGraph: refresh,
});
