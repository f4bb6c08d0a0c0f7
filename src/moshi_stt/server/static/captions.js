// Caption mode: the latest words in large type, in full screen or in a small window that stays above other programs.

const CHARACTERS = 160;

export class Captions {
  constructor(view) {
    this.view = view;
    this.window = null;
    this.full = document.getElementById("captions");
    this.box = document.getElementById("caption-text");
    this.update = () => {
      if (this.window) this.draw(this.window.document.getElementById("caption-text"));
      if (!this.full.hidden) this.draw(this.box);
    };
    view.listeners.add(this.update);
    document.addEventListener("fullscreenchange", () => document.fullscreenElement || this.closeFull());
    document.getElementById("captions-close").onclick = () => this.closeFull();
    addEventListener("keydown", (event) => event.key === "Escape" && !this.full.hidden && this.closeFull());
  }

  draw(box) {
    const { settled, interim } = this.view.tail(CHARACTERS);
    const text = box.ownerDocument.createElement("p");
    const grey = box.ownerDocument.createElement("span");
    grey.className = "interim";
    grey.textContent = interim;
    text.append(settled || interim ? `${settled} ` : "Captions appear here.", grey);
    box.replaceChildren(text);
    box.scrollTop = box.scrollHeight;
  }

  async openFull(opener) {
    this.opener = opener;
    this.full.hidden = false;
    document.body.classList.add("captioning");
    this.draw(this.box);
    document.getElementById("captions-close").focus();
    await this.full.requestFullscreen?.().catch(() => {}); // without it the captions fill the page
  }

  closeFull() {
    if (this.full.hidden) return;
    this.full.hidden = true;
    document.body.classList.remove("captioning");
    if (document.fullscreenElement) document.exitFullscreen();
    this.opener?.focus();
  }

  /** The small window: Document Picture-in-Picture stays on top; elsewhere a pop-up. Returns false where both are refused. */
  async openWindow() {
    if (this.window && !this.window.closed) {
      this.window.focus();
      return true;
    }
    const size = { width: 640, height: 190 };
    let small;
    try {
      small = window.documentPictureInPicture
        ? await window.documentPictureInPicture.requestWindow(size)
        : window.open("", "moshi-stt-captions", `popup,width=${size.width},height=${size.height}`);
    } catch {
      small = null;
    }
    if (!small) return false;
    const { document: page } = small;
    page.title = "Captions";
    page.documentElement.lang = document.documentElement.lang;
    page.documentElement.dataset.theme = document.documentElement.dataset.theme ?? "";
    const style = page.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("page.css", import.meta.url).href;
    page.head.replaceChildren(style);
    page.body.className = "caption-window";
    const box = page.createElement("div");
    box.id = "caption-text";
    page.body.replaceChildren(box);
    small.addEventListener("pagehide", () => { this.window = null; });
    this.window = small;
    this.draw(box);
    return true;
  }
}
