"""How a page of a report looks: one column on a grid, two schemes, and paper."""

from __future__ import annotations

from moe_surgery.report.pictures.palette import MONOSPACED, PLAIN, TONES, style

_PAGE = f"""
*{{box-sizing:border-box}}
html{{color-scheme:light dark;-webkit-text-size-adjust:100%}}
body{{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 {PLAIN}}}
main{{max-width:1008px;margin:0 auto;padding:40px 24px 64px}}
h1{{font-size:30px;line-height:1.2;margin:4px 0 6px;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}}
h2{{font-size:20px;margin:52px 0 14px;font-weight:650;letter-spacing:-.005em}}
h3{{font-size:15px;margin:0;font-weight:600;overflow-wrap:anywhere}}
h4{{font-size:13px;margin:24px 0 8px;font-weight:600;color:var(--muted)}}
p{{margin:6px 0;max-width:76ch;overflow-wrap:anywhere;text-wrap:pretty}}
a{{color:inherit;text-decoration-color:var(--muted);text-underline-offset:3px}}
code,pre,.mono{{font-family:{MONOSPACED};font-size:13px;overflow-wrap:anywhere}}
.q{{color:var(--muted)}} .lead{{max-width:none}} .why{{font-size:13px;line-height:1.4}}
.counts{{display:flex;flex-wrap:wrap;gap:8px 44px;margin:28px 0 10px;padding:0}}
.counts div{{min-width:84px}}
.counts b{{display:block;font-size:40px;line-height:1.1;font-weight:650;font-variant-numeric:tabular-nums}}
.counts span{{color:var(--muted)}}
.zero b{{color:var(--muted);font-weight:400}}
.alarm{{border-left:4px solid var(--bad);padding:8px 14px;background:var(--panel);margin:20px 0}}
.alarm b{{color:var(--bad)}}
table{{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}}
th{{text-align:left;font-weight:600;font-size:13px;color:var(--muted);padding:4px 16px 4px 0}}
th{{border-bottom:1px solid var(--rule)}}
td{{padding:7px 16px 7px 0;border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:anywhere}}
td.n,th.n{{text-align:right;white-space:nowrap}} td.f{{white-space:nowrap;overflow-wrap:normal}}
th:last-child,td:last-child{{padding-right:0}}
.stack th:first-child{{min-width:min(280px,34vw)}}
.chip{{display:inline-block;min-width:20px;height:20px;line-height:20px;border-radius:3px;text-align:center;font-size:12px;
font-weight:600;color:var(--paper);padding:0 4px;white-space:nowrap;margin-right:8px;vertical-align:1px}}
.key{{display:flex;flex-wrap:wrap;gap:6px 22px;margin:14px 0 0;color:var(--muted);font-size:13px}}
article{{border-top:1px solid var(--rule);padding-top:20px;margin-top:28px}}
article>header{{display:flex;gap:4px;align-items:baseline}}
figure{{margin:0}}
.pair{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:20px 48px;margin-top:20px}}
.pair svg,.wide svg,.narrow svg{{height:auto}}
figcaption{{color:var(--muted);font-size:13px;margin-top:8px;max-width:84ch}}
.narrow{{display:none}}
details{{margin:12px 0;border-top:1px solid var(--rule);padding-top:10px}}
summary{{cursor:pointer;font-weight:600}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);padding:14px;border-radius:5px;font-size:12px}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:4px 24px;margin:0}}
dt{{color:var(--muted)}} dd{{margin:0;overflow-wrap:anywhere}}
.held{{color:var(--good)}} .fails{{color:var(--bad)}}
@media (max-width:640px){{
main{{padding:24px 16px 48px}} h1{{font-size:24px}} .wide{{display:none}} .narrow{{display:block}}
.counts{{gap:8px 12px}} .counts b{{font-size:32px}} .counts div{{min-width:0;flex:1 0 auto}}
.stack thead{{display:none}} .stack tr{{display:block;border-bottom:1px solid var(--rule);padding:8px 0}}
.stack td{{display:block;border:0;padding:1px 0;text-align:left!important;white-space:normal!important}}
.stack td[data-h]:before{{content:attr(data-h) " ";color:var(--muted)}}
}}
@media print{{
main{{max-width:none;padding:0}} article,figure,tr{{break-inside:avoid}} h2,h4{{break-after:avoid}}
*{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
}}
"""
_TONES = "".join(f".chip.{tone}{{background:var(--{tone})}}" for tone in dict.fromkeys(TONES.values()))


def page_style() -> str:
    """The whole style sheet, that of the pictures included."""
    return f"{style()}{_PAGE}{_TONES}"
