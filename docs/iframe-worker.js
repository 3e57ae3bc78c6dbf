// Browsers start no workers on pages that are read from the disk. There, this runs the search in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      this.inside = this.frame.contentWindow
      this.inside.postMessage = data => this.onmessage?.({ data })
      const script = this.inside.document.createElement("script")
      script.src = url
      this.loaded = new Promise(resolve => (script.onload = resolve))
      this.inside.document.body.append(script)
    }
    postMessage(data) {
      this.loaded.then(() => this.inside.onmessage({ data }))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
