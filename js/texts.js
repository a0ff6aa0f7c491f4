/** What charts say, in the language of the front end. The texts lie where the host looks for translations: locales/<language>/main.json. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const SECTION = "lodestarCharts";

/** By language and key. @type {Record<string, Record<string, string>>} */
let texts = {};

/** Ask the server for the texts of all packs, once, and keep ours. */
export async function loadTexts() {
  if (texts.en) return;
  const answer = await api.fetchApi("/i18n");
  if (!answer.ok) return;
  const all = Object.entries(await answer.json());
  texts = Object.fromEntries(all.filter(([, packs]) => packs[SECTION]).map(([language, packs]) => [language, packs[SECTION]]));
}

/**
 * A text with its placeholders filled in. Of two that a bar parts the first is for a count of one.
 * @param {string} key
 * @param {Record<string, string | number>} [values]
 * @returns {string}
 */
export function say(key, values = {}) {
  const language = app.extensionManager.setting.get("Comfy.Locale");
  const text = texts[language]?.[key] ?? texts.en?.[key] ?? key;
  const forms = text.split(" | ");
  return forms[values.count === 1 ? 0 : forms.length - 1].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}
