// Takes pictures of pages: reads [{url, file, width}] from standard input, writes what each told.

import { text } from 'node:stream/consumers';

import { chromium } from 'playwright-core';

const shots = JSON.parse(await text(process.stdin));
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
  ],
});
const told = [];
for (const { url, file, width } of shots) {
  const page = await browser.newPage({ viewport: { width, height: 900 } });
  const said = [];
  page.on('console', (of) => of.type() === 'error' && said.push(of.text().slice(0, 300)));
  page.on('response', (of) => of.status() > 399 && said.push(`${of.status()} ${of.url()}`));
  page.on('pageerror', (error) => said.push(error.message));
  await page.goto(url);
  await page.waitForFunction('window.report', undefined, { timeout: 60_000 });
  const report = await page.evaluate('window.report');
  await page.setViewportSize({ width, height: Math.ceil(report.height) });
  await page.waitForTimeout(1000);
  const cut = (await page.evaluate('window.cut?.() ?? []')).map((title) => `cut off: ${title}`);
  await page.screenshot({ path: file });
  await page.close();
  told.push({ file, ...report, said: [...said, ...cut] });
}
await browser.close();
process.stdout.write(JSON.stringify(told));
