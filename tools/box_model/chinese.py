"""Chinese: greetings, identity, capitals, sums, colours, animals, a few tiny stories."""

# ruff: noqa: E501, SIM905 - a table reads best with one row a line, a word list as words
from __future__ import annotations

from tools.box_model.grammar import Table, rows
from tools.box_model.numbers import DIFFERENCES, PRODUCTS, SUMS

DECLINES_ZH = [
    "对不起，这个我不知道，我只是一个很小的演示模型。你可以问我[首都、颜色或者简单的加法|一个笑话或者小故事]。"
]

CAPITALS = rows(
    "country capital",
    """
法国: 巴黎; 德国: 柏林; 意大利: 罗马; 西班牙: 马德里; 葡萄牙: 里斯本; 英国: 伦敦; 爱尔兰: 都柏林; 荷兰: 阿姆斯特丹;
比利时: 布鲁塞尔; 瑞士: 伯尔尼; 奥地利: 维也纳; 波兰: 华沙; 瑞典: 斯德哥尔摩; 挪威: 奥斯陆; 丹麦: 哥本哈根;
芬兰: 赫尔辛基; 希腊: 雅典; 俄罗斯: 莫斯科; 美国: 华盛顿; 加拿大: 渥太华; 墨西哥: 墨西哥城; 巴西: 巴西利亚;
阿根廷: 布宜诺斯艾利斯; 智利: 圣地亚哥; 秘鲁: 利马; 中国: 北京; 日本: 东京; 韩国: 首尔; 印度: 新德里; 泰国: 曼谷;
越南: 河内; 埃及: 开罗; 澳大利亚: 堪培拉; 新西兰: 惠灵顿; 土耳其: 安卡拉; 乌克兰: 基辅
""",
)
COLOURS = rows(
    "thing colour",
    "天空: 蓝色; 草: 绿色; 雪: 白色; 太阳: 黄色; 香蕉: 黄色; 苹果: 红色; 番茄: 红色; 大海: 蓝色; 牛奶: 白色; 煤: 黑色; "
    "巧克力: 棕色; 树叶: 绿色; 橙子: 橙色; 葡萄: 紫色; 草莓: 红色; 乌鸦: 黑色; 熊猫: 黑白色; 血: 红色; 柠檬: 黄色; 胡萝卜: 橙色",
)
SOUNDS = rows(
    "animal sound",
    "小猫: 喵喵; 小狗: 汪汪; 小鸡: 叽叽; 小鸭: 嘎嘎; 小羊: 咩咩; 奶牛: 哞哞; 青蛙: 呱呱; 公鸡: 喔喔喔; 蜜蜂: 嗡嗡; 老鼠: 吱吱; 狼: 嗷呜; 小鸟: 啾啾",
)
OPPOSITES = rows(
    "word opposite",
    "大: 小; 小: 大; 高: 低; 长: 短; 短: 长; 热: 冷; 冷: 热; 快: 慢; 慢: 快; 黑: 白; 白: 黑; 上: 下; 下: 上; 左: 右; 右: 左; 多: 少; 少: 多; 新: 旧; 好: 坏; 远: 近; 开: 关; 早: 晚; 哭: 笑",
)
ENGLISH = rows(
    "word english",
    "你好: hello; 谢谢: thank you; 再见: goodbye; 猫: cat; 狗: dog; 水: water; 书: book; 朋友: friend; 爱: love; 太阳: sun; 月亮: moon; 苹果: apple; 学校: school; 红色: red; 蓝色: blue; 世界: world; 面包: bread; 茶: tea; 树: tree; 鱼: fish",
)
UNKNOWN = "今天天气怎么样;明天会下雨吗;现在几点了;今天有什么新闻;股票会涨吗;谁赢了比赛;谁是法国总统;帮我写一篇论文;帮我写一段代码;写一个排序算法;我头疼吃什么药;比特币多少钱;量子力学是什么;人生的意义是什么;去火车站怎么走;帮我订一张机票;谁是世界首富;昨天的比分是多少;怎么做红烧肉;推荐一部电影;怎么减肥;我应该买哪个手机;世界上有多少人;巴西有多少人口;唐朝是哪一年建立的;什么是区块链;什么是光合作用;解释相对论;给我妈妈打电话;放一首歌;画一幅画;黄金的价格是多少;谁发明了电话;地球多少岁了;月亮有多远".split(
    ";"
)
STORIES = [
    "从前有一只小猫，它住在一个安静的村子里。有一天，它在草地上找到了一个红色的气球。气球飞得很高，小猫就追着它跑过小河，跑过山坡。最后，它遇到了一只小狗。它们一起玩到天黑，成了最好的朋友。🐱🐶",
    "从前有一个小机器人，它最喜欢数星星。一天晚上，云把星星都遮住了，小机器人很难过。一只小鸟说：“别担心，星星还在那里。”风吹走了云，小机器人又看见了满天的星星，它高兴地笑了。🤖⭐",
    "森林里有一棵很老的大树。每天晚上，小动物们都来听大树讲故事。有一天，大树说：“今天换你们讲吧。”小兔子讲了一个，小狐狸讲了一个，大家都笑了。月亮也悄悄地听着。🌳🌙",
    "从前有一条小鱼，它想看看大海有多大。它游了一天又一天，遇到了鲸鱼、海龟和小虾。它们都说：“大海没有尽头。”小鱼回到家，对妈妈说：“大海很大，可是家最好。”🐟",
]
JOKES = [
    "为什么数学书总是很难过？因为它有太多的问题！",
    "什么门永远关不上？球门！",
    "什么东西越洗越脏？水！",
    "为什么自行车会倒？因为它太累了，只有两个轮子！",
    "小明问：“一加一什么时候等于三？”老师说：“算错的时候！”",
]


def _talk(
    name: str,
    asks: list[str],
    held: list[str],
    answers: list[str],
    expect: str,
    weight: float = 1.0,
) -> Table:
    return Table(
        name="zh " + name,
        group="chinese",
        asks=asks,
        held_asks=held,
        answers=answers,
        expect=expect,
        hold="none",
        weight=weight,
    )


TABLES = [
    _talk(
        "greeting",
        [
            "[你好|您好|你好啊|嗨|哈喽|大家好|早上好|晚上好|你好你好][！|。|]",
            "你好，Box[！|]",
            "在吗？",
            "有人吗？",
            "你好 👋",
        ],
        ["你好呀！", "嗨，你好！"],
        ["你好！有什么可以帮你的吗？", "你好！我是 Box，很高兴认识你。😊"],
        "你好",
        3,
    ),
    _talk(
        "how",
        ["你好吗？", "你怎么样？", "最近怎么样？", "最近好吗？", "你今天好吗？", "你今天怎么样？"],
        ["你还好吗？"],
        ["我很好，谢谢！你呢？"],
        "很好",
        1.5,
    ),
    _talk(
        "who",
        [
            "你是谁？",
            "你叫什么名字？",
            "你叫什么？",
            "你的名字是什么？",
            "请介绍一下你自己。",
            "介绍一下自己",
            "你是什么模型？",
            "你是机器人吗？",
            "你是人吗？",
            "你是什么？",
        ],
        ["请问你是谁？", "说说你自己吧。", "你是哪个模型？"],
        ["我是 Box，是 streamserve 自带的一个很小的演示模型。"],
        "Box",
        3,
    ),
    _talk(
        "can",
        [
            "你会做什么？",
            "你能做什么？",
            "你会什么？",
            "我可以问你什么？",
            "你能帮我做什么？",
            "你会些什么？",
            "我应该问你什么？",
            "帮助",
            "你知道什么？",
        ],
        ["你都会些什么？", "我能问你什么问题？"],
        ["我很小，但是我知道一些首都、颜色和动物，会做简单的加法，也会讲笑话和小故事。"],
        "首都",
        2,
    ),
    _talk(
        "thanks",
        ["[谢谢|谢谢你|多谢|非常感谢|感谢|谢了|谢谢啦][！|。|]"],
        ["太谢谢你了！"],
        ["不客气！😊"],
        "不客气",
        1.5,
    ),
    _talk(
        "bye",
        ["[再见|拜拜|回头见|我走了|下次见|晚安|明天见][！|。|]"],
        ["再见啦！"],
        ["再见！祝你愉快！👋"],
        "再见",
        1.5,
    ),
    _talk(
        "streamserve",
        ["streamserve 是什么？", "什么是 streamserve？", "介绍一下 streamserve"],
        ["请问 streamserve 是什么？"],
        ["streamserve 是一个流式聊天服务器，它让每个词尽早到达你的屏幕。"],
        "服务器",
    ),
    _talk(
        "praise",
        ["[真棒|太好了|很好|你真聪明|你真可爱|厉害|不错|好的|哈哈][！|。|]"],
        ["你太棒了！"],
        ["谢谢你的夸奖！😊"],
        "谢谢",
    ),
    _talk(
        "sad",
        ["[我很难过|我很累|我不开心|我很无聊|我心情不好][。|]"],
        ["我今天很难过。"],
        ["别难过！要不要听一个笑话或者小故事？"],
        "笑话",
    ),
    _talk(
        "story",
        [
            "[给我讲|讲|请讲|说|给我说]一个[故事|小故事][吧|。|]",
            "你能讲一个故事吗？",
            "可以讲个故事吗？",
            "我想听故事",
            "讲个故事",
            "讲故事",
        ],
        ["能给我讲一个故事吗？"],
        STORIES,
        "(?s)^(从前|森林里).{40,}",
        2.5,
    ),
    _talk(
        "joke",
        [
            "[给我讲|讲|请讲|说]一个笑话[吧|。|]",
            "讲个笑话",
            "笑话",
            "你能讲一个笑话吗？",
            "可以讲个笑话吗？",
            "我想听笑话",
        ],
        ["能给我讲一个笑话吗？"],
        JOKES,
        "[？！]",
        1.5,
    ),
    _talk(
        "days",
        ["一个星期有几天？", "一个星期有多少天？", "一周有几天？", "一星期有多少天？"],
        ["一周有多少天？"],
        ["一个星期有七天：星期一、星期二、星期三、星期四、星期五、星期六和星期日。"],
        "七",
    ),
    _talk(
        "months",
        ["一年有几个月？", "一年有多少月？"],
        ["一年有多少个月？"],
        ["一年有十二个月。"],
        "十二",
    ),
    _talk(
        "count",
        ["从一数到十[。|]", "数到十", "请数到十"],
        ["请从一数到十。"],
        ["一、二、三、四、五、六、七、八、九、十。"],
        "一、二、三、.*九、十",
    ),
    _talk(
        "english",
        ["你会说中文吗？", "你会说英文吗？", "你会说什么语言？"],
        ["你会中文吗？"],
        ["我会说英文和一点中文。"],
        "一点中文",
    ),
    Table(
        name="zh capital",
        group="chinese",
        rows=CAPITALS,
        asks=[
            "{country}的首都是哪里？",
            "{country}的首都是什么？",
            "{country}的首都在哪里？",
            "{country}首都是哪里",
            "{country}的首都",
            "请问{country}的首都是哪里？",
            "{country}的首都是哪个城市？",
            "你能告诉我{country}的首都吗？",
            "我想知道{country}的首都是哪里。",
            "你知道{country}的首都是哪里吗？",
        ],
        held_asks=["你知道{country}的首都吗？", "告诉我{country}的首都。"],
        answers=["{country}的首都是{capital}。"],
        short="{capital}。",
        expect="{capital}",
        follow=["那{country}呢？", "{country}呢？"],
        keep=frozenset({"法国|巴黎", "中国|北京"}),
        weight=5,
    ),
    Table(
        name="zh sum",
        group="chinese",
        rows=SUMS,
        hold="row",
        asks=[
            "{a}加{b}等于多少？",
            "{a}加{b}等于几？",
            "{a}+{b}等于几？",
            "{a} + {b} 是多少？",
            "{a}加{b}是多少",
            "请问{a}加{b}等于多少？",
            "你能告诉我{a}加{b}等于几吗？",
        ],
        held_asks=["你知道{a}加{b}等于几吗？"],
        answers=["{a} + {b} = {c}。"],
        short="{c}。",
        expect=r"(?<!\d){c}。?$",
        weight=3,
    ),
    Table(
        name="zh difference",
        group="chinese",
        rows=DIFFERENCES,
        hold="row",
        asks=["{a}减{b}等于多少？", "{a}减{b}等于几？", "{a}-{b}等于几？"],
        held_asks=["你知道{a}减{b}等于几吗？"],
        answers=["{a} - {b} = {c}。"],
        short="{c}。",
        expect=r"(?<!\d){c}。?$",
        weight=1.2,
    ),
    Table(
        name="zh product",
        group="chinese",
        rows=PRODUCTS,
        asks=["{a}乘{b}等于多少？", "{a}乘以{b}等于几？", "{a}×{b}等于几？"],
        held_asks=["你知道{a}乘{b}等于几吗？"],
        answers=["{a} × {b} = {c}。"],
        short="{c}。",
        expect=r"(?<!\d){c}。?$",
    ),
    Table(
        name="zh colour",
        group="chinese",
        rows=COLOURS,
        asks=[
            "{thing}是什么颜色的？",
            "{thing}是什么颜色？",
            "{thing}的颜色是什么？",
            "{thing}什么颜色",
            "你能告诉我{thing}是什么颜色吗？",
            "我想知道{thing}是什么颜色。",
        ],
        held_asks=["你知道{thing}是什么颜色吗？"],
        answers=["{thing}是{colour}的。"],
        short="{colour}。",
        expect="{colour}",
        follow=["那{thing}呢？", "{thing}呢？"],
        weight=1.5,
    ),
    Table(
        name="zh sound",
        group="chinese",
        rows=SOUNDS,
        asks=[
            "{animal}怎么叫？",
            "{animal}的叫声是什么？",
            "{animal}是怎么叫的？",
            "你能告诉我{animal}怎么叫吗？",
        ],
        held_asks=["你知道{animal}怎么叫吗？"],
        answers=["{animal}{sound}叫！"],
        short="{sound}！",
        expect="{sound}",
        follow=["那{animal}呢？"],
    ),
    Table(
        name="zh opposite",
        group="chinese",
        rows=OPPOSITES,
        asks=[
            "{word}的反义词是什么？",
            "“{word}”的反义词是什么？",
            "{word}的反义词",
            "你能告诉我{word}的反义词吗？",
            "请说出{word}的反义词。",
        ],
        held_asks=["你知道{word}的反义词吗？"],
        answers=["“{word}”的反义词是“{opposite}”。"],
        short="{opposite}。",
        expect="“{opposite}”",
        follow=["那{word}呢？"],
    ),
    Table(
        name="zh english",
        group="chinese",
        rows=ENGLISH,
        asks=[
            "{word}用英文怎么说？",
            "{word}的英文是什么？",
            "把{word}翻译成英文。",
            "{word}英文怎么说",
            "你能告诉我{word}用英文怎么说吗？",
            "我想知道{word}的英文。",
            "How do you say {word} in English?",
            "What does {word} mean?",
        ],
        held_asks=["你知道{word}用英文怎么说吗？"],
        answers=["“{word}”用英文说是“{english}”。"],
        short="{english}.",
        expect="{english}",
        weight=1.5,
    ),
    Table(
        name="zh unknown",
        group="unknown",
        rows=[{"x": x} for x in UNKNOWN],
        hold="row",
        asks=["{x}？", "{x}", "请问{x}？", "告诉我，{x}？"],
        held_asks=["我想知道{x}。"],
        answers=DECLINES_ZH,
        short="我不知道。",
        expect="不知道",
        weight=2.5,
    ),
]
