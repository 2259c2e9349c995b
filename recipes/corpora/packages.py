"""Which packages a corpus is made of. No project that is held out has a package that is trained on, but for one: of
Linux, user-mode-linux-doc is held out and the kernel's source and documentation are trained on.

Python's standard library is on neither side: some of its files are the held-out text of every machine.
"""

from __future__ import annotations

from typing import NamedTuple


class Package(NamedTuple):
    """One package of Debian.

    Attributes:
        name: as apt knows it.
        held_out: evaluated on, not trained on.
        code: its sources are read; otherwise its documentation.
        only: a regular expression that the paths read of it match; "" for all.
    """

    name: str
    held_out: bool
    code: bool
    only: str = ""


TRAIN_PROSE = """
    anarchism dict-gcide dict-jargon dict-foldoc dict-devil fortunes-min fortunes gitmagic
    debian-reference-en debian-policy developers-reference maint-guide debian-history debian-faq debian-kernel-handbook
    debian-edu-doc-en harden-doc aptitude-doc-en live-manual-txt linux-doc-6.1 python3.11-doc perl-doc ruby3.1-doc
    postgresql-doc-15 sqlite3-doc r-doc-html octave-doc maxima-doc gcl-doc guile-3.0-doc racket-doc gnuplot-doc
    apache2-doc nginx-doc exim4-doc-html icinga2-doc lemonldap-ng-doc nova-doc neutron-doc cinder-doc sphinx-doc
    cppreference-doc-en-html libboost1.74-doc vim-doc fontforge-doc gettext-doc gnumeric-doc mate-user-guide
    python-biopython-doc python-dask-doc python-xarray-doc
"""
TRAIN_CODE = """
    linux-source-6.1 golang-1.19-src golang-golang-x-tools-dev golang-github-docker-docker-dev
    golang-google-grpc-dev golang-github-prometheus-alertmanager-dev librust-cargo-dev librust-tokio-dev
    librust-syntect-dev elpa-magit libboost1.74-dev libeigen3-dev libstdc++-12-dev perl-modules-5.36 octave-common
    node-typescript python3-numpy python3-sklearn python3-nova python3-networkx python3-statsmodels python3-biopython
    python3-electrum python3-samba python3-scapy python3-yt
"""
HELD_OUT_PROSE = """
    abs-guide cfi-en mh-book png-definitive-guide c++-annotations-html gnu-standards user-mode-linux-doc autoconf-doc
    git-doc postfix-doc zsh-doc bash-doc bind9-doc ghc-doc erlang-doc nodejs-doc swi-prolog-doc sbcl-doc tcl8.6-doc
    python-sympy-doc python-pandas-doc python-django-doc python-sqlalchemy-doc twisted-doc krb5-doc gnutls-doc
    knot-resolver-doc frr-doc ntpsec-doc proftpd-doc haproxy-doc weechat-doc shorewall-doc slurm-wlm-doc scons-doc
    cmake-doc borgbackup-doc yacas-doc gap-doc singular-doc therion-doc povray-doc renpy-doc lammps-doc wireshark-doc
    systemtap-doc pcp-doc snd-doc lilypond-doc asymptote-doc
"""
HELD_OUT_CODE = """
    python3-sympy python3-django python3-sqlalchemy python3-twisted python3-pandas python3-dipy python3-nibabel
    python3-nltk python3-mdanalysis python3-pymatgen python3-skbio python3-spyder python3-breezy python3-impacket
    python3-gensim python3-kivy python3-fonttools python3-ezdxf golang-gvisor-gvisor-dev
    golang-github-syncthing-syncthing-dev golang-github-rclone-rclone-dev golang-github-nats-io-nats-server-dev
    golang-mongodb-mongo-driver-dev golang-github-evanw-esbuild-dev golang-gonum-v1-plot-dev
    golang-github-snapcore-snapd-dev golang-github-osrg-gobgp-dev librust-sequoia-openpgp-dev librust-rav1e-dev
    librust-gimli-dev librust-encoding-rs-dev elpa-ess elpa-helm-core elpa-org libcgal-dev libstb-dev
    nlohmann-json3-dev libimgui-dev libsimde-dev libglm-dev tcllib mediawiki dokuwiki libmojolicious-perl
"""
ONLY = {
    "linux-source-6.1": r"/(kernel|mm|block|ipc|init|lib|security|crypto|fs/(ext4|btrfs|nfs|xfs)|net/(core|ipv4))/",
    "linux-doc-6.1": r"/_sources/(?!translations|userspace-api/media)",
}
PACKAGES = [
    Package(name, held_out, code, ONLY.get(name, ""))
    for names, held_out, code in (
        (TRAIN_PROSE, False, False),
        (TRAIN_CODE, False, True),
        (HELD_OUT_PROSE, True, False),
        (HELD_OUT_CODE, True, True),
    )
    for name in names.split()
]
