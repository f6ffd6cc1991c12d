// A picture of a page, for docs/images/.
//
//   npm install @sparticuz/chromium puppeteer-core
//   node docs/screenshot.mjs runs/superhf-lab/report.html docs/images/report.png
//
// After the two paths: width, height, and light or dark.
import path from "node:path";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [page, picture, width = 1100, height = 900, scheme = "light"] =
  process.argv.slice(2);
const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox"],
  executablePath: await chromium.executablePath(),
  headless: "shell",
});
const tab = await browser.newPage();
await tab.setViewport({ width: +width, height: +height });
await tab.emulateMediaFeatures([
  { name: "prefers-color-scheme", value: scheme },
]);
await tab.goto("file://" + path.resolve(page));
await tab.screenshot({ path: picture });
await browser.close();
