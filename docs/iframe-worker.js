// Browsers start no workers on pages that are read from the disk. There, this runs the search in a hidden frame instead.
// As with a worker, each side gets copies, and gets them later.
if (location.protocol === "file:") {
  const send = (data, receive) => {
    const copy = structuredClone(data)
    setTimeout(() => receive({ data: copy }))
  }
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      this.inside = this.frame.contentWindow
      this.inside.postMessage = data => send(data, event => this.onmessage?.(event))
      const script = this.inside.document.createElement("script")
      script.src = url
      this.loaded = new Promise(resolve => (script.onload = resolve))
      this.inside.document.body.append(script)
    }
    postMessage(data) {
      this.loaded.then(() => send(data, event => this.inside.onmessage(event)))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
