"""How the report looks: on light and dark, on a phone and on paper."""

CSS = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--ink:#1c252d;--faint:#5d6974;--line:#e2e5e7;
--a:#2f6db5;--b:#c9601a;--c:#2b8767;--d:#7b55b0;--e:#857f18;--bad:#b8322a;--good:#23744f;--soft:#eef2f6}
@media (prefers-color-scheme:dark){:root{--bg:#11161b;--card:#192027;--ink:#e4e9ee;--faint:#9ba8b4;
--line:#2e3841;--a:#6cabf0;--b:#eda063;--c:#62c4a0;--d:#b79bea;--e:#cdc764;--bad:#f08379;--good:#6fcf9f;--soft:#222c35}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 6px;font-weight:650;letter-spacing:-.015em}
h2{font-size:1.15rem;margin:40px 0 12px;font-weight:640;letter-spacing:-.005em}
h3{font-size:.95rem;margin:0;font-weight:620;display:inline}
p{margin:0 0 12px;max-width:72ch}
code,pre{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{margin:0;white-space:pre-wrap;background:var(--soft);padding:10px 12px;border-radius:8px}
.lead,.unit,.note,caption,footer{color:var(--faint)}
.note{font-size:.875rem;margin:4px 0 0}
.state{display:inline-block;font-size:.85rem;font-weight:600;padding:1px 10px;border-radius:99px;
border:1px solid currentColor;margin-right:8px}
.good{color:var(--good)}.bad{color:var(--bad)}
.alert{border-left:4px solid var(--bad);background:var(--card);padding:10px 14px;border-radius:0 8px 8px 0}
dl.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:10px;margin:20px 0 0}
dl.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:9px 12px}
dl.tiles dt{color:var(--faint);font-size:.8rem}
dl.tiles dd{margin:0;font-size:1.2rem;font-weight:620;font-variant-numeric:tabular-nums;line-height:1.3}
dl.tiles dd small{font-size:.78rem;font-weight:450;color:var(--faint);display:block}
.pair{display:grid;gap:12px;align-items:start;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;
min-width:0}
figcaption{font-size:.9rem}
.unit{font-size:.83rem}
.legend,.ranks{list-style:none;padding:0;margin:4px 0 0;display:flex;flex-wrap:wrap;gap:2px 14px;
font-size:.83rem}
.legend li::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle;background:currentColor}
.legend li.mark::before{width:2px;height:12px}
.legend .a{color:var(--a)}.legend .b{color:var(--b)}.legend .c{color:var(--c)}.legend .d{color:var(--d)}
.legend .e{color:var(--e)}.legend .faint{color:var(--faint)}.legend .busy{color:var(--ink)}
.legend .resume{color:var(--c)}.legend .fault{color:var(--bad)}
.ranks i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.plot{position:relative;margin:12px 0 0;padding:0 6px 24px 46px}
.plot svg{display:block;width:100%;height:210px;overflow:visible}
.ys,.xs{font-size:.75rem;color:var(--faint);font-variant-numeric:tabular-nums}
.ys{position:absolute;left:0;top:0;width:40px;height:210px}
.ys span{position:absolute;right:0;transform:translateY(-50%)}
.xs{position:relative;height:0}
.xs span{position:absolute;top:5px;transform:translateX(-50%)}
.xs em{position:absolute;left:-44px;top:5px;font-style:normal}
svg path{fill:none;stroke:currentColor;stroke-width:1.8;vector-effect:non-scaling-stroke;
stroke-linejoin:round}
svg path.grid{stroke:var(--line);stroke-width:1}
svg .a{stroke:var(--a)}svg .b{stroke:var(--b)}svg .c{stroke:var(--c)}svg .d{stroke:var(--d)}
svg path.faint{stroke-width:1;opacity:.35}
svg path.thin{stroke-width:1.2;opacity:.7}
svg path.dot{stroke-width:7;stroke-linecap:round}
svg path.mark{stroke-width:1.4;stroke-dasharray:4 3}
svg path.resume{stroke:var(--c)}svg path.fault{stroke:var(--bad)}
svg.strips{display:block;width:100%;margin-top:12px}
svg.mask,svg.strips{shape-rendering:crispEdges}
svg.mask{display:block;width:100%;max-width:300px;margin:12px auto 0;border-radius:4px}
svg .empty{fill:var(--soft)}
figure+p,.scroll+details{margin-top:10px}
svg.lanes{background:var(--soft);margin:2px 0 8px}
svg.lanes .a{fill:var(--a);stroke:none}svg.lanes .b{fill:var(--b);stroke:none}
svg.lanes .c{fill:var(--c);stroke:none}svg.lanes .d{fill:var(--d);stroke:none}
svg.lanes .e{fill:var(--e);stroke:none}svg.lanes .faint{fill:var(--faint)}svg.lanes .busy{fill:var(--ink)}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;width:100%;font-size:.9rem;background:var(--card)}
caption{text-align:left;font-size:.875rem;padding:12px 0 6px}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--faint);font-weight:560;font-size:.83rem}
tbody th{font-weight:500;color:var(--faint);width:38%}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
table.heat{max-width:420px}
table.heat td,table.heat th{text-align:right;white-space:nowrap;width:auto;font-variant-numeric:tabular-nums}
table.heat td{background:color-mix(in srgb,var(--a) calc(var(--share,0%)*.45),transparent)}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0 0 8px;padding:0 14px}
summary{cursor:pointer;padding:9px 0;font-weight:560}
summary small{font-weight:400;color:var(--faint)}
details table{margin-bottom:10px}
details tr:last-child>*{border-bottom:0}
.pictures{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.pictures img{display:block;max-width:100%;height:auto;margin:10px auto 0;background:#fff;border-radius:4px}
.pictures .small img{image-rendering:pixelated}
a{color:var(--a)}
:focus-visible{outline:2px solid var(--a);outline-offset:2px}
footer{margin-top:44px;font-size:.85rem}
@media (max-width:520px){main{padding:20px 14px 36px}h1{font-size:1.4rem}figure{padding:10px}
.plot{padding-left:40px}.ys{width:35px}.xs em{left:-38px}th,td{padding:6px 6px}tbody th{width:48%}}
@media print{body{background:#fff}details>*{display:block}figure,details,tr{break-inside:avoid}}
"""
