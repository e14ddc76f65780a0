// Draws an answer's trajectories over the playing video, and its intervals on the time line below it.
// The page changes the video and the hidden element .pite-scene; this script looks at both before each repaint.
(() => {
  "use strict";
  const TAIL = 8; // frames
  const TICKS = 6;
  let drawn = null; // what the time line shows now: the scene as JSON, and the video's source and duration
  let scene = {};

  const find = (selector) => document.querySelector(selector);

  function repaint() {
    const video = find(".pite-screen video");
    if (video) {
      const text = find(".pite-scene")?.dataset.scene ?? "{}";
      const state = JSON.stringify([text, video.currentSrc, video.duration]);
      if (state !== drawn || !find(".pite-ruler")) {
        drawn = state;
        scene = JSON.parse(text);
        buildTimeline(video, find(".pite-timeline"));
        buildLegend(find(".pite-legend"));
      }
      movePlayhead(video);
      drawTracks(video, find(".pite-screen canvas"));
    }
    requestAnimationFrame(repaint);
  }

  // ---- time line

  const lengthOf = (video) => scene.duration || video.duration || 0;
  const percent = (seconds, video) => `${Math.min(Math.max((100 * seconds) / lengthOf(video), 0), 100)}%`;

  function element(tag, name, text = "", style = {}) {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = text;
    Object.assign(made.style, style);
    return made;
  }

  function buildTimeline(video, line) {
    line.replaceChildren();
    if (!lengthOf(video)) return;
    const events = (scene.events ?? []).filter((event) => event.seconds);
    for (const event of events) line.append(lane(event, video));
    if (!events.length) {
      const hint = scene.events ? "The answer gives no interval." : "The intervals of the answer appear here.";
      line.append(element("div", "pite-hint", hint));
    }
    line.append(ruler(video), element("div", "pite-playhead"));
    line.onclick = (click) => {
      const box = line.getBoundingClientRect();
      jump(video, ((click.clientX - box.left) / box.width) * lengthOf(video));
    };
  }

  function lane(event, video) {
    const [start, end] = event.seconds;
    const row = element("div", "pite-lane");
    const what = event.text.replace(/,?\s*\bfrom \d+ (to|and) \d+\b,?\s*/i, "").trim();
    const side = start / lengthOf(video) < 0.5 ? { left: percent(start, video) } : { right: percent(lengthOf(video) - end, video) };
    const label = element("span", "pite-label", what, side);
    label.prepend(element("b", "", `${start.toFixed(1)} to ${end.toFixed(1)} s`));
    row.append(label);
    const bar = element("button", "pite-event", "", {
      left: percent(start, video),
      width: percent(end - start, video),
      background: event.color,
    });
    bar.type = "button";
    bar.title = `frames ${event.frames[0]} to ${event.frames[1]}: jump to ${start.toFixed(1)} s`;
    bar.setAttribute("aria-label", bar.title);
    bar.onclick = (click) => {
      click.stopPropagation();
      jump(video, start);
    };
    row.append(bar);
    return row;
  }

  function ruler(video) {
    const made = element("div", "pite-ruler");
    const total = lengthOf(video);
    const rough = total / TICKS;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
    for (let time = 0; time <= total - step / 3; time += step) {
      made.append(element("span", "pite-tick", `${+time.toFixed(2)} s`, { left: percent(time, video) }));
    }
    made.append(element("span", "pite-tick pite-last", `${total.toFixed(1)} s`, { left: "100%" }));
    return made;
  }

  function jump(video, seconds) {
    video.currentTime = Math.min(Math.max(seconds, 0) + 0.001, lengthOf(video));
  }

  function movePlayhead(video) {
    const head = find(".pite-playhead");
    if (head) head.style.left = percent(video.currentTime, video);
  }

  function buildLegend(legend) {
    const entries = (scene.tracks ?? []).map((track) => {
      const entry = element("span", "pite-object", track.phrase);
      entry.prepend(element("i", "", "", { background: track.color }));
      return entry;
    });
    legend.replaceChildren(...entries);
  }

  // ---- trajectories

  function drawTracks(video, canvas) {
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [video.clientWidth, video.clientHeight];
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    canvas.dataset.points = 0;
    if (!scene.tracks?.length || !scene.times?.length || !video.videoWidth) return;
    const picture = pictureBox(video, width, height);
    const time = video.currentTime + 1e-4;
    let frame = scene.times.findLastIndex((each) => each <= time);
    frame = Math.max(frame, 0);
    for (const track of scene.tracks) drawTrack(context, track, frame, picture, canvas);
  }

  // Where the picture is inside the video element, which keeps its proportions.
  function pictureBox(video, width, height) {
    const ratio = Math.min(width / video.videoWidth, height / video.videoHeight);
    const size = [video.videoWidth * ratio, video.videoHeight * ratio];
    return { left: (width - size[0]) / 2, top: (height - size[1]) / 2, width: size[0], height: size[1] };
  }

  function drawTrack(context, track, frame, picture, canvas) {
    const [first, last] = track.frames ?? [0, scene.times.length - 1];
    if (frame < first || frame > last) return;
    const unit = Math.max(Math.min(picture.width, picture.height) / 180, 1.4);
    const place = ([x, y]) => [picture.left + x * picture.width, picture.top + y * picture.height];
    for (const point of track.points) {
      const whole = point.slice(first, last + 1).map(place);
      const past = point.slice(Math.max(frame - TAIL, first), frame + 1).map(place);
      drawPath(context, whole, track.color, unit, 0.55);
      drawPath(context, past, "rgb(16, 18, 24)", 3 * unit, 1);
      drawPath(context, past, track.color, 2 * unit, 1);
      context.beginPath();
      context.arc(...past.at(-1), 3.2 * unit, 0, 2 * Math.PI);
      context.fillStyle = track.color;
      context.fill();
      context.lineWidth = unit;
      context.strokeStyle = "rgb(16, 18, 24)";
      context.stroke();
      canvas.dataset.points = Number(canvas.dataset.points) + 1;
    }
    drawName(context, track, track.points.map((point) => place(point[frame])), picture);
  }

  function drawPath(context, places, color, wide, alpha) {
    context.beginPath();
    places.forEach(([x, y]) => context.lineTo(x, y));
    context.strokeStyle = color;
    context.lineWidth = wide;
    context.lineJoin = context.lineCap = "round";
    context.globalAlpha = alpha;
    context.stroke();
    context.globalAlpha = 1;
  }

  function drawName(context, track, places, picture) {
    const top = Math.min(...places.map(([, y]) => y));
    const middle = places.reduce((sum, [x]) => sum + x, 0) / places.length;
    context.font = "600 14px system-ui, sans-serif";
    context.textAlign = "center";
    const half = context.measureText(track.phrase).width / 2 + 4;
    const x = Math.min(Math.max(middle, picture.left + half), picture.left + picture.width - half);
    const y = Math.max(top - 14, picture.top + 18);
    context.lineWidth = 4;
    context.lineJoin = "round";
    context.strokeStyle = "rgba(16, 18, 24, 0.85)";
    context.strokeText(track.phrase, x, y);
    context.fillStyle = "white";
    context.fillText(track.phrase, x, y);
  }

  requestAnimationFrame(repaint);
})();
