"""How the report looks: on a screen, light and dark, and on paper."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--ground:light-dark(#f5f5f2,#141517);
--sheet:light-dark(#fff,#1c1e21);--ink:light-dark(#1b1d1f,#e9eaeb);
--soft:light-dark(#5c6166,#a3a9b0);--rule:light-dark(#e0e1dd,#32363b);
--kept:light-dark(#0b6e69,#4fc4b8);--gone:light-dark(#c9cdca,#474d54);
--warn:light-dark(#a8321f,#ff9d86);--shade:light-dark(#a8321f14,#ff9d8618);
font:15px/1.5 system-ui,-apple-system,"Segoe UI","Helvetica Neue","DejaVu Sans",sans-serif}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink)}
main{max-width:1120px;margin:0 auto;padding:36px 24px 80px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:46px 0 4px}
h3{font-size:14px;margin:0;font-weight:620;overflow-wrap:anywhere}
p{margin:0}.soft,.lead{color:var(--soft)}.lead{max-width:76ch;margin-bottom:14px;font-size:14px}
section>.small{margin-top:10px}.small{font-size:12.5px;color:var(--soft)}.bad{color:var(--warn)}
code,pre{font-family:ui-monospace,"SF Mono","DejaVu Sans Mono",monospace;font-size:12.5px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:8px 0 0}
.sheet{background:var(--sheet);border:1px solid var(--rule);border-radius:12px;padding:16px 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;
margin-top:24px}
.tiles .sheet{padding:13px 16px}.tiles b{display:block;font-size:25px;line-height:1.25;
font-weight:640;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.tiles span{font-size:12.5px;color:var(--soft)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:12px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(310px,1fr));gap:12px}
.row{display:flex;justify-content:space-between;gap:10px;align-items:baseline}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:550;color:var(--soft);text-align:right;font-size:12.5px;padding:4px 8px;
vertical-align:bottom}
td{padding:6px 8px;border-top:1px solid var(--rule);text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
td.left,th.left{text-align:left;overflow-wrap:anywhere}
td:not(.left){white-space:nowrap}
.wide{overflow-x:auto}
.funnel{display:grid;gap:3px}
.funnel div{display:grid;grid-template-columns:minmax(150px,34%) 1fr 92px 82px 108px;gap:12px;
align-items:center;font-size:13.5px;font-variant-numeric:tabular-nums}
.funnel .name{overflow-wrap:anywhere;line-height:1.3;padding:3px 0}
.funnel .track{height:17px;background:none;position:relative}
.funnel .track i{position:absolute;inset:0 auto 0 0;background:var(--kept);border-radius:3px;
min-width:2px}
.funnel .track i.lost{background:var(--gone)}
.funnel span{text-align:right}.funnel .name,.funnel .track{text-align:left}
svg.chart{display:block;width:100%;height:96px;margin-top:8px;border-bottom:1px solid var(--rule)}
.kept{fill:var(--kept)}.gone{fill:var(--gone)}.shade{fill:var(--shade)}
.limit{stroke:var(--warn);stroke-width:1.4;stroke-dasharray:4 3;vector-effect:non-scaling-stroke}
.axis{display:flex;justify-content:space-between;font-size:11.5px;color:var(--soft);
font-variant-numeric:tabular-nums;margin-top:2px}
.key{display:flex;flex-wrap:wrap;gap:6px 18px;font-size:12.5px;color:var(--soft);margin:0 0 10px}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px}
.key .k{background:var(--kept)}.key .g{background:var(--gone)}
.key .l{width:0;height:12px;border-left:2px dashed var(--warn);border-radius:0;
vertical-align:-1px}
.bars{list-style:none;margin:8px 0 0;padding:0;display:grid;gap:2px;font-size:13px}
.bars li{position:relative;display:flex;gap:10px;padding:1px 8px;
font-variant-numeric:tabular-nums}
.bars i{position:absolute;inset:0 auto 0 0;background:var(--kept);opacity:.17;border-radius:4px}
.bars span{flex:1;overflow-wrap:anywhere}.bars b{font-weight:550}
.bars em{font-style:normal;color:var(--soft);width:52px;text-align:right}
.columns{display:block;columns:2;column-gap:26px}.columns li{break-inside:avoid;margin-bottom:2px}
.band{display:grid;grid-template-columns:132px 1fr;gap:14px;padding:9px 0;
border-top:1px solid var(--rule)}
.band:first-of-type{border-top:0}
.band>div:first-child{font-size:13px;font-variant-numeric:tabular-nums}
.samples{display:grid;grid-template-columns:repeat(5,minmax(0,1fr));gap:8px}
figure{margin:0;min-width:0}
figure .film{aspect-ratio:16/9;position:relative;background:#0b0c0d;border-radius:6px;
overflow:hidden;
display:grid;place-items:center;color:#9aa0a6;font-size:11px;text-align:center}
figure img{position:absolute;inset:0;width:100%;height:100%;object-fit:contain;display:block}
figcaption{font-size:11.5px;line-height:1.35;color:var(--soft);margin-top:3px;overflow:hidden;
display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:2;overflow-wrap:anywhere}
figure.out .film{outline:3px solid var(--warn);outline-offset:-3px}figure.out img{opacity:.6}
figure b{color:var(--ink);font-weight:600}
details summary{cursor:pointer;color:var(--soft);font-size:13.5px}
footer{margin-top:50px;font-size:12.5px;color:var(--soft)}
@media screen and (max-width:720px){main{padding:22px 14px 60px}
.funnel div{grid-template-columns:1fr auto auto;gap:1px 12px;padding:6px 0;
border-top:1px solid var(--rule)}
.funnel .name{grid-column:1/-1}.funnel .track{grid-column:1/-1;height:11px}
.band{grid-template-columns:1fr}.samples{grid-template-columns:repeat(3,minmax(0,1fr))}
.columns{columns:1}}
@media print{:root{color-scheme:light;font-size:11px}body{background:#fff}
main{max-width:none;padding:0}.sheet,figure,.band,.funnel div,tr{break-inside:avoid}
h2,.lead{break-after:avoid}h2{margin-top:26px}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details>*{display:block}@page{margin:14mm}}
"""
