/** Pictures in this pack's help pages open at their own size on a click: the help panel is narrow. */

import { app } from "../../scripts/app.js";

const PICTURES = `.node-help-content img[src*="${new URL("docs/", import.meta.url).pathname}"]`;
const STYLE = `${PICTURES} { cursor: zoom-in; } .lodestar-picture { margin: auto; padding: 0; border: none; cursor: zoom-out; }
.lodestar-picture::backdrop { background: rgb(0 0 0 / 0.7); } .lodestar-picture img { display: block; max-width: 95vw; max-height: 95vh; }`;

/** Over the page, until it is clicked or Escape is pressed. @param {HTMLImageElement} picture */
function enlarge(picture) {
  const dialog = document.createElement("dialog");
  dialog.className = "lodestar-picture";
  dialog.setAttribute("aria-label", picture.alt);
  dialog.append(Object.assign(new Image(), { src: picture.src, alt: picture.alt }));
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", ({ key }) => key === "Escape" && dialog.close()); // the front end has Escape for itself
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

app.registerExtension({
  name: "Lodestar.Help",
  setup() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
    document.addEventListener("click", ({ target }) => {
      if (target instanceof Element && target.matches(PICTURES)) enlarge(/** @type {HTMLImageElement} */ (target));
    });
  },
});
